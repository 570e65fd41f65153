"""The demo's path at its smallest, with the real servers: URLs over HTTP to pictures, killed once on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.demo.emoji import ATTRIBUTION
from infra.demo.web import Web, start_web
from infra.prefect_client import PrefectAPI, run_refresh_deployment
from infra.stack import LocalStack
from starflow.checkpoints import load_manifest
from starflow.objectstore import open_store
from starflow.snapshots import list_snapshots
from tests.infra.small_work import artifacts_of, newest_run, published_events

PICTURES, ADDED = 60, 12
#: Enough that seconds pass between the first checkpoint, upon which a rank is killed, and the end.
STEPS = 120


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    server = start_web(tmp_path_factory.mktemp("web"), limit=PICTURES, hazard_every=5, second=ADDED)
    yield server
    server.stop()


def starflow(*arguments: str) -> Any:
    """Runs the command line and returns its JSON answer."""
    command = [sys.executable, "-m", "starflow.cli", *arguments, "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


def wait_for(condition: Any, seconds: float, what: str) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.05)
    return found


@pytest.mark.timeout(3000)  # on a busy machine; each step has its own limit
def test_urls_to_pictures(stack: LocalStack, s3_url: str, web: Web, tmp_path: Path) -> None:
    parameters = {
        "store": s3_url,
        "allow_host": ["127.0.0.1"],
        "attribution": ATTRIBUTION,
        "fetch_seconds": 3.0,
        "batch_size": 40,
        "actors": 1,
    }
    first = refresh(stack, web.lists[0], parameters)
    assert first["added"] == first["total"] > 25
    assert {"http_404", "private_address", "duplicate"} <= set(first["dropped"])

    the_page_shows_it(PrefectAPI(stack.state.env["PREFECT_API_URL"]), first, s3_url)

    before = web.requests()
    second = refresh(stack, web.lists[1], parameters)
    assert second["parent"] == first["snapshot"]
    assert second["kept"] == first["total"]
    assert second["total"] == second["kept"] + second["added"]
    assert 0 < second["added"] <= ADDED
    new = web.requests() - before
    pictures = Counter({path: count for path, count in new.items() if path.startswith("/emoji")})
    assert 0 < len(pictures) <= 2 * ADDED, "the second refresh fetches only what is new"
    assert [summary.id for summary in list_snapshots(open_store(s3_url))] == [first["snapshot"], second["snapshot"]]

    run = train_with_a_kill(s3_url, second["snapshot"], tmp_path)
    assert (run["state"], run["step"], run["restarts"]) == ("completed", STEPS, 1)
    lines = [json.loads(line) for line in Path(run["metrics"]).read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    trained = load_manifest(open_store(s3_url), "small").trained
    assert (trained.snapshot, trained.attribution) == (second["snapshot"], ATTRIBUTION)

    picture = tmp_path / "picture.png"
    starflow("sample", "a red heart", "--checkpoint", f"{s3_url}/small", "--out", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")


def the_page_shows_it(api: PrefectAPI, answer: dict[str, Any], store: str) -> None:
    page = artifacts_of(api, newest_run(api, "refresh/refresh-now"))
    assert {row["reason"]: row["samples"] for row in json.loads(page["refresh-drops"])} == answer["dropped"]
    assert page["refresh-pictures"].startswith("data:image/png;base64,")
    assert f"| samples | 0 | {answer['total']} | +{answer['total']} |" in page["refresh-difference"]
    told = {"snapshot": answer["snapshot"], "store": store, "total": answer["total"]}
    wait_for(lambda: published_events(api, store) == [told], 60, "the event of the new snapshot")


def refresh(stack: LocalStack, urls: Path, parameters: dict[str, Any]) -> dict[str, Any]:
    return run_refresh_deployment(stack.state.env, {"urls": str(urls), **parameters}, timeout=600)


def train_with_a_kill(store: str, snapshot: str, folder: Path) -> dict[str, Any]:
    """STEPS steps on two ranks; rank 1 is killed after the first checkpoint."""
    file = folder / "train.yaml"
    settings = {
        "store": store,
        "run": "small",
        "snapshot": snapshot,
        "preset": "emoji",
        "model": {"width": 64, "layers": [1, 1, 2]},
        "ranks": 2,
        "zero_stage": 2,
        "steps": STEPS,
        "global_batch_size": 8,
        "checkpoint_every": 10,
        "validation_every": 60,
        "held_out": 0.1,
        "cache": str(folder / "cache"),
    }
    file.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "starflow.cli", "train", "--config", str(file)]
    trainer = subprocess.Popen(command, start_new_session=True)
    try:
        wait_for(lambda: list(open_store(store).list("runs/small/checkpoints/")), 240, "the first checkpoint")
        beat = next((folder / "cache/runs/small/attempts").glob("*/heartbeat-1.json"))
        os.kill(json.loads(beat.read_text())["pid"], signal.SIGKILL)
        assert trainer.wait(300) == 0
    finally:
        if trainer.poll() is None:
            trainer.terminate()
            trainer.wait(30)
    return starflow("runs", "show", "small", "--store", store)
