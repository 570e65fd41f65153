"""A refresh and its storage: S3 that is down, hangs, is slow, full or forgets to answer; full disks; wrong keys.

Whatever happens ends in one sentence, and the same refresh afterwards ends as if nothing had happened.
"""

from __future__ import annotations

import errno
import os
import resource
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.config import Config as BotoConfig

from pipelines.config import RefreshConfig
from pipelines.refresh import refresh
from starflow import s3store
from starflow.errors import StarflowError, StoreError
from starflow.objectstore import LocalStore
from tests.faulty_s3 import FaultyS3
from tests.pipelines.fake_crawl import STEADY, Bench, fake_encode
from tests.pipelines.hostile_web import HostileWeb
from tests.pipelines.kills import committed_urls, content


@pytest.fixture
def proxy(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """In the place of the S3 server, before a client that asks twice."""

    def clients(patience: float | None) -> Any:
        settings = BotoConfig(retries={"mode": "standard", "total_max_attempts": 2}, read_timeout=10)
        client = boto3.session.Session().client("s3", config=settings)
        return s3store._Clients(client, client)

    with FaultyS3(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        monkeypatch.setattr(s3store, "_s3_clients", clients)
        yield proxy


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proxy: FaultyS3, s3_url: str) -> Bench:
    bench = Bench(tmp_path, monkeypatch)
    bench.store = s3_url
    return bench


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a refresh leaves in a store without faults."""
    with pytest.MonkeyPatch.context() as patch:
        bench = Bench(tmp_path_factory.mktemp("calm"), patch)
        bench.refresh(bench.write_list(STEADY))
        return content(bench)


@pytest.mark.parametrize(
    ("mode", "after", "message"),
    [
        ("down", 0, r"after \d+ attempts in .* check that the endpoint http://127.0.0.1:\d+ is up"),
        ("down", 40, r"after \d+ attempts in .* check that the endpoint http://127.0.0.1:\d+ is up"),
        pytest.param(
            "hang",
            80,
            r"after \d+ attempts in .* check that the endpoint http://127.0.0.1:\d+ is up",
            marks=pytest.mark.slow,
        ),
        pytest.param("503", 110, "Please reduce your request rate", marks=pytest.mark.slow),
        ("507", 15, r"is full, it did not take \S+ .*make room"),
        pytest.param("denied", 60, "refuses these credentials .*AWS_ACCESS_KEY_ID", marks=pytest.mark.slow),
    ],
)
def test_a_store_that_fails_in_the_middle_is_gone_on_with(
    bench: Bench, proxy: FaultyS3, calm: Any, mode: str, after: int, message: str
) -> None:
    listed = bench.write_list(STEADY)
    proxy.after = after  # of about 140 requests; for 507, of the writes among them
    proxy.mode = mode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s3store, "FIRST_DEADLINE_SECONDS", 0.5)
        patch.setattr(s3store, "DEADLINE_SECONDS", 0.5)
        with pytest.raises(StoreError, match=message) as caught:
            bench.refresh(listed)
    assert "\n" not in str(caught.value)
    proxy.mode = ""
    fetched, asked = committed_urls(bench), dict(bench.web.requests)
    bench.refresh(listed)
    assert content(bench) == calm
    assert all(bench.web.requests[name] == asked[name] for name in fetched)


@pytest.mark.parametrize(
    ("mode", "only"),
    [
        ("lost", "^PUT .*/plans/000.json"),
        pytest.param("lost", "^PUT .*/crawl.json", marks=pytest.mark.slow),
        ("lost", "^PUT .*/snapshots/"),
        ("lost", "^PUT .*/ledger/0.*json"),
        ("flip", "^PUT .*images-.*tar"),
        ("flip", "^GET .*fetched-.*parquet$"),
        pytest.param("slow", None, marks=pytest.mark.slow),
    ],
)
def test_a_store_that_stumbles_is_not_noticed(
    bench: Bench, proxy: FaultyS3, calm: Any, mode: str, only: str | None
) -> None:
    proxy.only, proxy.count, proxy.rate = only, None if mode == "slow" else 1, 200_000.0
    proxy.mode = mode
    bench.refresh(bench.write_list(STEADY))
    assert proxy.struck >= 1
    assert content(bench) == calm


def run_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "starflow.cli", "refresh", "--json", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=300)


def test_the_command_without_its_store_says_so(tmp_path: Path, s3_url: str) -> None:
    (tmp_path / "list.txt").write_text("http://127.0.0.1:9/a.png\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = ["--urls", str(tmp_path / "list.txt"), "--allow-host", "127.0.0.1"]
    cases = [
        (
            s3_url,
            {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"},
            f"check that the endpoint http://127.0.0.1:{port}",
            74,
        ),
        (s3_url, {"AWS_SECRET_ACCESS_KEY": "wrong"}, "refuses these credentials", 1),
        ("s3://no-such-bucket", {}, "bucket no-such-bucket does not exist; create it", 1),
    ]
    for store, environment, sentence, status in cases:
        finished = run_command("--store", store, *arguments, **environment)
        assert finished.returncode == status
        assert finished.stdout == ""
        errors = [line for line in finished.stderr.splitlines() if line.strip()]
        assert sentence in errors[-1], finished.stderr
        assert errors[-1].startswith("error: ")
        assert "Traceback" not in finished.stderr


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_local_store_is_one_sentence_and_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calm: Any, number: int
) -> None:
    bench = Bench(tmp_path, monkeypatch)
    listed = bench.write_list(STEADY)
    original, left = LocalStore.write, [9]

    def write(self: LocalStore, key: str, data: bytes) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(number, os.strerror(number), str(self.path(key)))
        original(self, key, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalStore, "write", write)
        with pytest.raises(StarflowError, match=rf"no room left for {bench.store}/crawl/\S+ \(.*\); free space"):
            bench.refresh(listed)
    bench.refresh(listed)
    assert content(bench) == calm


def crawl_config(tmp_path: Path, web: HostileWeb) -> RefreshConfig:
    """A list of pictures that a small disk cannot take, over real HTTP and the real crawl processes."""
    names = ("png", "jpeg", "webp", "gif", "bmp", "tiff", "cmyk", "palette", "alpha", "rotated")
    urls = [f"{web.base}/{name}" for name in names]
    pq.write_table(pa.table({"url": urls, "caption": list(names)}), tmp_path / "list.parquet")
    return RefreshConfig(
        urls=str(tmp_path / "list.parquet"), store=str(tmp_path / "store"), allow_host=("127.0.0.1",), retry_rounds=0
    )


def test_a_used_up_quota_ends_the_crawl_processes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on the size of files stands for the quota: both are errors of a single write, on a disk with room."""
    monkeypatch.setattr("pipelines.encode.encode", fake_encode)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with HostileWeb() as web:
        config = crawl_config(tmp_path, web)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            with pytest.raises(StarflowError, match=r"no room left for .*/batch .*free space there, or set TMPDIR"):
                refresh(config)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert refresh(config).added == 10


def test_a_full_disk_under_the_crawl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small disk cannot be mounted here")
    monkeypatch.setattr("pipelines.encode.encode", fake_encode)
    monkeypatch.setattr(tempfile, "tempdir", str(small))
    try:
        with HostileWeb() as web:
            config = crawl_config(tmp_path, web)
            (small / "taken").write_bytes(bytes(120_000))
            with pytest.raises(StarflowError, match=rf"no room left for {small}\S+ \(No space left on device\)"):
                refresh(config)
            monkeypatch.setattr(tempfile, "tempdir", None)
            assert refresh(config).added == 10
    finally:
        subprocess.run(["umount", str(small)], check=True)
