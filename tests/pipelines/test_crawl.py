"""Every hostile case through the real subprocess, with img2dataset, at once."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest

from pipelines import crawl
from pipelines.config import RefreshConfig
from pipelines.crawl import fetch_batch
from pipelines.guard import FetchPolicy
from starflow.errors import StarflowError
from tests.pipelines.hostile_web import BLOCKED_HOST, CASES, Case, HostileWeb, picture


def hostile_policy(**changes: Any) -> FetchPolicy:
    """Small limits, but time enough for what a busy machine has to send, fetch and look at."""
    config = RefreshConfig(urls="-", store="-", contact="me@example.org", allow_host=("127.0.0.1",))
    limits = {"seconds": 60.0, "max_bytes": 2**20, "max_frames": 20, "block_hosts": frozenset((BLOCKED_HOST,))}
    return config.policy().model_copy(update={**limits, **changes})


def as_table(urls: list[str], etag: str = "") -> pa.Table:
    return pa.table({"url": urls, "etag": [etag] * len(urls), "last_modified": [""] * len(urls)})


@pytest.fixture(scope="module")
def web() -> Iterator[HostileWeb]:
    with HostileWeb() as web:
        yield web


@pytest.fixture(scope="module")
def outcomes(web: HostileWeb, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("crawl")
    (folder / "rules").mkdir()
    rows: dict[str, Any] = {}
    for name, policy in (("batch", hostile_policy()), ("endless", hostile_policy(seconds=2.0))):
        cases = [case for case in CASES if (case.reason == "timeout") == (name == "endless")]
        urls = as_table([web.url(case) for case in cases], '"v1"')
        table = fetch_batch(urls, policy, 1, 128, folder / name, folder / "rules")
        rows |= {case.name: row for case, row in zip(cases, table.to_pylist(), strict=True)}
    return {"rows": rows, "folder": folder / "batch"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_case_ends_as_it_should(case: Case, outcomes: dict[str, Any]) -> None:
    row = outcomes["rows"][case.name]
    assert (row["status"], row["reason"]) == (case.status, case.reason)


def test_a_full_disk_ends_the_crawl_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """img2dataset would hang until the batch's limit."""
    monkeypatch.setattr(crawl.shutil, "disk_usage", lambda folder: SimpleNamespace(free=4096))
    (tmp_path / "rules").mkdir()
    with pytest.raises(OSError, match="No space left"):
        fetch_batch(as_table(["http://127.0.0.1:9/1.png"]), hostile_policy(), 1, 4, tmp_path / "b", tmp_path / "rules")


def test_there_are_more_than_forty_cases() -> None:
    assert len(CASES) > 80


def test_original_bytes_sizes_and_ids_are_kept(outcomes: dict[str, Any]) -> None:
    row = outcomes["rows"]["png"]
    blob = (outcomes["folder"] / "output" / f"{row['shard']:05d}.bin").read_bytes()
    assert blob[row["offset"] :][: row["size"]] == picture("PNG")
    assert row["id"] == hashlib.sha256(picture("PNG")).hexdigest()
    assert (row["width"], row["height"], row["format"]) == (64, 48, "png")


def test_exif_rotation_swaps_width_and_height(outcomes: dict[str, Any]) -> None:
    row = outcomes["rows"]["rotated"]
    assert (row["width"], row["height"]) == (48, 64)


def test_perceptual_hashes_survive_the_format(outcomes: dict[str, Any]) -> None:
    rows = outcomes["rows"]
    for kind in ("jpeg", "webp", "cmyk", "icc-profile"):
        different = (rows[kind]["phash"] ^ rows["png"]["phash"]) & (2**64 - 1)
        assert different.bit_count() <= 6, kind


def test_retry_after_is_kept(outcomes: dict[str, Any]) -> None:
    assert outcomes["rows"]["status-503"]["retry_after"] == 120
    assert outcomes["rows"]["status-429"]["retry_after"] == 120


def test_the_crawl_says_who_it_is_and_asks_for_rules_once(web: HostileWeb, outcomes: dict[str, Any]) -> None:
    assert len(web.agents) == 1
    assert "starflow/" in next(iter(web.agents))
    assert "+me@example.org" in next(iter(web.agents))
    assert web.requests["/robots.txt"] == 1
    assert web.requests["/private/a.png"] == web.requests["/reserved/a.png"] == 0


def test_a_batch_over_its_limit_is_stopped_and_leaves_no_process(web: HostileWeb, tmp_path: Path) -> None:
    (tmp_path / "rules").mkdir()
    urls = as_table([f"{web.base}/drip"])
    table = fetch_batch(urls, hostile_policy(seconds=500.0), 1, 4, tmp_path / "batch", tmp_path / "rules", limit=3.0)
    assert table["reason"].to_pylist() == ["batch_time_limit"]
    assert not [child for child in psutil.Process().children(recursive=True) if "crawl_worker" in line_of(child)]


def line_of(process: psutil.Process) -> str:
    """Its command line; empty when it has ended meanwhile."""
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def test_of_a_shard_that_was_stopped_what_is_whole_is_kept(tmp_path: Path) -> None:
    data = [picture(seed=seed) for seed in range(3)]
    lines = [
        {"row": row, "status": "ok", "reason": "", "http": 200, "id": hashlib.sha256(each).hexdigest()}
        | {"offset": sum(map(len, data[:row])), "size": len(each)}
        for row, each in enumerate(data)
    ]
    lines.append({"row": 3, "status": "failed", "reason": "http_404", "http": 404})
    text = "\n".join(json.dumps(line) for line in [*lines, {"row": 4, "status": "ok"}])
    (tmp_path / "00000.jsonl").write_text(text[:-5])  # the last line was cut off
    (tmp_path / "00000.bin").write_bytes(b"".join(data)[:-7])  # and so were the last bytes
    table = crawl._outcomes(tmp_path, 0, np.arange(6), "batch_time_limit").sort_by("row")
    assert table["reason"].to_pylist() == [
        "",
        "",
        "batch_time_limit",
        "http_404",
        "batch_time_limit",
        "batch_time_limit",
    ]
    assert table["id"].to_pylist()[:2] == [hashlib.sha256(each).hexdigest() for each in data[:2]]


def test_statistics_that_do_not_add_up_are_not_believed(tmp_path: Path) -> None:
    lines = [{"row": row, "status": "failed", "reason": "http_404", "http": 404} for row in range(2)]
    (tmp_path / "00000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "00000_stats.json").write_text(json.dumps({"count": 3, "successes": 0}))
    table = crawl._outcomes(tmp_path, 0, np.arange(3), "crawl_lost").sort_by("row")
    assert table["reason"].to_pylist() == ["http_404", "http_404", "crawl_lost"]


#: In the crawl's own processes: pictures that hang the decoder, or kill the process that it runs in.
HOSTILE_DECODER = """
import os, time
from PIL import Image
open_image = Image.open
def open_or_stop(file, formats=None):
    if b"<title" in file.getvalue():
        time.sleep(1000)
    if b"<svg" in file.getvalue():
        os.kill(os.getpid(), 9)
    return open_image(file, formats=formats)
Image.open = open_or_stop
"""


def test_a_picture_that_stops_the_decoder_costs_itself_and_no_other(
    web: HostileWeb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(HOSTILE_DECODER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(crawl, "_PROCESS_ROWS", 1)
    later = [0.0]
    monkeypatch.setattr(crawl, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + later[0]))

    def wait_for_both(done: int) -> None:
        marks = [path.read_text().split() for path in tmp_path.glob("batch/output/*.inspecting")]
        if {mark[0] for mark in marks if mark} == {"2", "3"}:
            later[0] = 1000.0

    (tmp_path / "rules").mkdir()
    urls = as_table([f"{web.base}/{name}" for name in ("png", "jpeg", "html", "svg", "webp", "gif")])
    table = fetch_batch(urls, hostile_policy(), 2, 1, tmp_path / "batch", tmp_path / "rules", wait_for_both)
    assert table["reason"].to_pylist() == ["", "", *["stops_the_decoder"] * 2, *["batch_time_limit"] * 2]
    assert table["status"].to_pylist() == ["ok", "ok", "failed", "failed", "retry", "retry"]


def test_a_picture_that_was_looked_at_when_the_time_was_up_is_not_blamed(tmp_path: Path) -> None:
    (tmp_path / "00000.inspecting").write_text(f"1 {time.monotonic()}")
    table = crawl._outcomes(tmp_path, 0, np.arange(2), "batch_time_limit")
    assert table["reason"].to_pylist() == ["batch_time_limit"] * 2


def test_a_row_lost_in_each_shard_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a crawl that has nothing to show at all is one."""

    def lose_one(folder: Path, *_: Any) -> bool:
        (folder / "output").mkdir()
        for index in range(2):
            line = {"row": index, "status": "failed", "reason": "http_404", "http": 404}
            (folder / "output" / f"{index:05d}.jsonl").write_text(json.dumps(line) + "\n")
        return False

    monkeypatch.setattr(crawl, "_run", lose_one)
    monkeypatch.setattr(crawl, "_PROCESS_ROWS", 1)
    urls = as_table([f"http://127.0.0.1:9/{index}.png" for index in range(4)])
    table = fetch_batch(urls, hostile_policy(), 2, 1, tmp_path / "batch", tmp_path)
    assert table["reason"].to_pylist() == ["http_404"] * 2 + ["crawl_lost"] * 2


def test_a_subprocess_without_any_result_is_an_error(
    web: HostileWeb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crawl.sys, "executable", "/bin/false")
    (tmp_path / "rules").mkdir()
    with pytest.raises(StarflowError, match="ended without a result"):
        fetch_batch(as_table([f"{web.base}/png"]), hostile_policy(), 1, 4, tmp_path / "batch", tmp_path / "rules")


def test_the_subprocess_sees_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert not {name for name in crawl._ENVIRONMENT if "AWS" in name or "PROXY" in name.upper()}
    assert "AWS_SECRET_ACCESS_KEY" in os.environ


def test_a_site_is_asked_by_one_process_only() -> None:
    urls = as_table([f"http://host{index % 7}.example/{index}" for index in range(100)])
    shards = crawl._split(urls, hostile_policy(), 3)
    hosts = [{index % 7 for index in rows} for rows in shards]
    assert sorted(index for rows in shards for index in rows) == list(range(100))
    assert all(not a & b for number, a in enumerate(hosts) for b in hosts[:number])
