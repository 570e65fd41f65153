"""Work for a real server that takes seconds: a web of noisy pictures to crawl, and a small training run."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from infra import processes
from infra.prefect_client import FINAL, PrefectAPI
from infra.stack import LocalStack
from starflow.objectstore import open_store

T = TypeVar("T")

#: A training run of under a minute on one rank, long enough to be caught at work several times on a busy machine.
SMALL_RUN: dict[str, Any] = {
    "preset": "emoji",
    "model": {"width": 64, "layers": [1, 1, 2]},
    "ranks": 1,
    "steps": 1000,
    "global_batch_size": 8,
    "checkpoint_every": 20,
    "validation_every": 500,
    "sample_every": 500,
    "held_out": 0.1,
    "lease_seconds": 5.0,
}


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        """The test's own output stays readable."""


@contextmanager
def serve_pictures(folder: Path, count: int) -> Iterator[Path]:
    """A URL list (Parquet) of `count` noisy pictures on loopback, and one that is missing."""
    rng = np.random.default_rng(0)
    (folder / "web").mkdir()
    for number in range(count):
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((32, 32), Image.Resampling.NEAREST).save(folder / "web" / f"{number}.png")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder / "web")))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        urls = [f"http://127.0.0.1:{server.server_port}/{number}.png" for number in range(count + 1)]
        captions = [f"tiles {number}" for number in range(count + 1)]
        pq.write_table(pa.table({"url": urls, "caption": captions}), folder / "urls.parquet")
        yield folder / "urls.parquet"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def training_on_publish(api: PrefectAPI, enabled: bool = True) -> Iterator[dict[str, Any]]:
    """The automation train-on-publish, on or not yet, for runs like `SMALL_RUN`; yields it, and puts all back."""
    deployment = api.get("/deployments/name/train/train-on-publish")
    automation = next(each for each in api.post("/automations/filter") if each["name"] == "train-on-publish")
    api.patch(f"/deployments/{deployment['id']}", {"parameters": deployment["parameters"] | SMALL_RUN})
    if enabled:
        api.patch(f"/automations/{automation['id']}", {"enabled": True})
    try:
        yield automation
    finally:
        api.patch(f"/automations/{automation['id']}", {"enabled": False})
        api.patch(f"/deployments/{deployment['id']}", {"parameters": deployment["parameters"]})


def wait_for(what: str, look: Callable[[], T], seconds: float) -> T:
    """What `look` returns once it is true; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds:.0f} s"
        time.sleep(0.25)
    return found


def state_of(api: PrefectAPI, run_id: str) -> dict[str, Any]:
    found: dict[str, Any] = api.get(f"/flow_runs/{run_id}")["state"]
    return found


def wait_for_state(api: PrefectAPI, run_id: str, name: str, seconds: float) -> None:
    """Until the run is in the state `name`; fails at once when it ends in another."""

    def reached() -> bool:
        state = state_of(api, run_id)
        assert state["name"] == name or state["type"] not in FINAL, f"{state['name']}: {state['message']}"
        return bool(state["name"] == name)

    wait_for(f"the state {name}", reached, seconds)


def newest_run(api: PrefectAPI, deployment: str) -> str:
    """Id of the run of `deployment` (FLOW/NAME) that was started last."""
    wanted = {"deployment_id": {"any_": [api.get(f"/deployments/name/{deployment}")["id"]]}}
    found = api.post("/flow_runs/filter", {"flow_runs": wanted, "sort": "START_TIME_DESC", "limit": 1})
    return str(found[0]["id"])


def artifacts_of(api: PrefectAPI, run_id: str) -> dict[str, Any]:
    """What the newest artifact of each key on the run's page holds; of tables JSON text."""
    wanted = {"artifacts": {"flow_run_id": {"any_": [run_id]}}, "sort": "CREATED_DESC"}
    return {found["key"]: found["data"] for found in reversed(api.post("/artifacts/filter", wanted))}


def published_events(api: PrefectAPI, store: str) -> list[dict[str, Any]]:
    """Payloads of the events that have told of a new snapshot of `store`, newest first."""
    resource = {"id": [f"starflow.store.{store}"]}
    wanted = {"filter": {"event": {"name": ["starflow.snapshot.published"]}, "resource": resource}}
    return [event["payload"] for event in api.post("/events/filter", wanted)["events"]]


def wait_for_reschedule(api: PrefectAPI, run_id: str, seconds: float = 240) -> None:
    """Until the run is no longer in the state in which it ended."""
    wait_for("the automatic reschedule", lambda: state_of(api, run_id)["type"] not in FINAL, seconds)


def training_started_by(api: PrefectAPI, snapshot: str, seconds: float = 120) -> dict[str, Any]:
    """The flow run that train-on-publish has made for `snapshot`."""
    deployment = api.get("/deployments/name/train/train-on-publish")["id"]

    def found() -> list[dict[str, Any]]:
        runs = api.post("/flow_runs/filter", {"flow_runs": {"deployment_id": {"any_": [deployment]}}})
        return [run for run in runs if run["parameters"].get("snapshot") == snapshot]

    return wait_for(f"a training run on {snapshot}", found, seconds)[0]


def at_work_on(stack: LocalStack, run: str) -> list[psutil.Process]:
    """The stack's processes, whoever started them, that name the training run in their command line."""
    found = []
    for process in processes.marked(stack.folder):
        with suppress(psutil.Error):
            if any(f"/runs/{run}/" in part for part in process.cmdline()):
                found.append(process)
    return found


def process_of(stack: LocalStack, flow_run: str) -> psutil.Process:
    """The Python process in which the flow run goes on."""
    for process in processes.marked(stack.folder):
        with suppress(psutil.Error):
            if process.environ().get("PREFECT__FLOW_RUN_ID") == flow_run and "prefect.engine" in " ".join(
                process.cmdline()
            ):
                return process
    raise AssertionError(f"flow run {flow_run} has no process")


def committed_steps(store: str, run: str) -> list[int]:
    """Steps in the run's committed metrics, in the order of the file."""
    lines = open_store(store).read(f"runs/{run}/metrics.jsonl").splitlines()
    return [json.loads(line)["step"] for line in lines]
