"""What happens when nobody looks: each automation is made to act on the real server, with seconds for minutes."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra import processes
from infra.bootstrap import WEBHOOK_BLOCK
from infra.prefect_client import PrefectAPI, cancel_run, start_run
from infra.stack import LocalStack
from tests.infra.small_work import serve_pictures, state_of, wait_for, wait_for_reschedule, wait_for_state

#: Seconds, by the end of the automation's name. Heartbeats come every 30 s; Prefect allows no less than 10 s.
WITHIN = {
    "crash runs without a heartbeat": 40,
    "give back runs stuck pending": 10,
    "end cancellations without a worker": 10,
    "reschedule crashed runs": 10,
    "data are stale": 10,
    "call a webhook when data are stale": 10,
    "call a webhook when a run fails": 0,
}
RESCHEDULED = WITHIN["reschedule crashed runs"] + 5.0
#: Prefect looks at what has not happened every 5 s; the machine may be busy.
PATIENCE = 60.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def api(stack: LocalStack) -> PrefectAPI:
    return PrefectAPI(stack.state.env["PREFECT_API_URL"])


@pytest.fixture
def automations(api: PrefectAPI) -> Iterator[dict[str, dict[str, Any]]]:
    """All of ours but train-on-publish, on and impatient, by what follows ``starflow: `` in their names."""
    found = {a["name"].removeprefix("starflow: "): a for a in api.post("/automations/filter")}
    ours = {name: found[name] for name in WITHIN}
    for name, automation in ours.items():
        replace(api, automation, enabled=True, trigger=automation["trigger"] | {"within": WITHIN[name]})
    try:
        yield ours
    finally:
        for automation in ours.values():
            replace(api, automation)


@pytest.fixture
def calls(api: PrefectAPI) -> Iterator[list[dict[str, Any]]]:
    """What has been posted to the address in the block starflow-webhook."""
    block = f"/block_types/slug/webhook/block_documents/name/{WEBHOOK_BLOCK}?include_secrets=true"
    document = api.get(block)
    with record_posts() as (address, posted):
        api.patch(f"/block_documents/{document['id']}", {"data": document["data"] | {"url": address}})
        try:
            yield posted
        finally:
            api.patch(f"/block_documents/{document['id']}", {"data": document["data"]})


@contextmanager
def record_posts() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An HTTP server on loopback; yields its address and the JSON it is sent."""
    posted: list[dict[str, Any]] = []

    class Recorder(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.headers["Content-Type"] == "application/json"
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            """The test's own output stays readable."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Recorder)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", posted
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def replace(api: PrefectAPI, automation: dict[str, Any], **changes: Any) -> None:
    """Puts the automation back as it was read, but for `changes`."""
    writable = ("name", "description", "enabled", "trigger", "actions")
    api.put(f"/automations/{automation['id']}", {key: automation[key] for key in writable} | changes)


def kill_worker(stack: LocalStack) -> None:
    """With everything below it, as when its machine is gone; `stack.up()` brings another."""
    pid = stack.status()["services"]["worker"]
    assert pid is not None, "no worker runs"
    processes.stop(processes.descendants(psutil.Process(pid)), seconds=0)


def has_acted(api: PrefectAPI, automation: dict[str, Any]) -> int:
    """How often an action of the automation has been carried out."""
    resource = {"id": [f"prefect.automation.{automation['id']}"]}
    name = ["prefect.automation.action.executed"]
    found = api.post("/events/filter", {"filter": {"event": {"name": name}, "resource": resource}})
    return len(found["events"])


def has_beaten(api: PrefectAPI, flow_run: str) -> bool:
    resource = {"id": [f"prefect.flow-run.{flow_run}"]}
    wanted = {"event": {"name": ["prefect.flow-run.heartbeat"]}, "resource": resource}
    return bool(api.post("/events/filter", {"filter": wanted})["events"])


def test_a_run_outlives_its_workers_and_is_reported(
    stack: LocalStack,
    api: PrefectAPI,
    s3_url: str,
    tmp_path: Path,
    automations: dict[str, dict[str, Any]],
    calls: list[dict[str, Any]],
) -> None:
    """Taken by a worker that dies before it starts it, then by one that dies while it crawls, then by a third."""
    with serve_pictures(tmp_path, 40) as urls:
        parameters = {"urls": str(urls), "store": s3_url, "allow_host": ["127.0.0.1"], "actors": 1, "batch_size": 8}
        run = start_run(api, "refresh/refresh-now", parameters)
        flow_run = run["id"]
        wait_for("a worker", lambda: state_of(api, flow_run)["type"] == "PENDING", PATIENCE)
        kill_worker(stack)
        assert state_of(api, flow_run)["type"] == "PENDING"
        wait_for_state(api, flow_run, "AwaitingRetry", PATIENCE)
        assert state_of(api, flow_run)["message"] == "Pending for too long; its worker is gone."

        stack.up()
        wait_for("a heartbeat", lambda: has_beaten(api, flow_run), PATIENCE)
        kill_worker(stack)
        killed = time.monotonic()
        wait_for("the crash", lambda: state_of(api, flow_run)["type"] == "CRASHED", PATIENCE + 60)
        print(f"crashed {time.monotonic() - killed:.0f} s after its worker and itself were killed")
        assert "No heartbeat" in state_of(api, flow_run)["message"]
        wait_for_reschedule(api, flow_run)
        call = wait_for("the webhook's call", lambda: calls[:1], PATIENCE)[0]
        assert call["text"].startswith(f"Run {run['name']} of refresh ended as Crashed: No heartbeat")
        assert call["text"].endswith(f"{stack.state.ui}/runs/flow-run/{flow_run}")

        stack.up()
        wait_for_state(api, flow_run, "Completed", 600)
        assert api.get(f"/flow_runs/{flow_run}")["run_count"] == 2
    for name in ("data are stale", "call a webhook when data are stale"):
        wait_for(name, lambda name=name: has_acted(api, automations[name]), PATIENCE)  # type: ignore[misc]
    stale = wait_for("the second call", lambda: calls[1:2], PATIENCE)[0]
    assert stale == {"text": f"No new snapshot for 0:00:10 (h:min:s) in {s3_url}"}


def test_a_run_that_is_cancelled_without_a_worker_stays_cancelled(
    stack: LocalStack, api: PrefectAPI, s3_url: str, tmp_path: Path, automations: dict[str, dict[str, Any]]
) -> None:
    with serve_pictures(tmp_path, 40) as urls:
        parameters = {"urls": str(urls), "store": s3_url, "allow_host": ["127.0.0.1"], "batch_size": 8}
        flow_run = start_run(api, "refresh/refresh-now", parameters)["id"]
        wait_for("a heartbeat", lambda: has_beaten(api, flow_run), 120)
        kill_worker(stack)
        cancel_run(api, flow_run)
        assert state_of(api, flow_run)["type"] == "CANCELLING"
        wait_for_state(api, flow_run, "Cancelled", PATIENCE)
        assert "no worker" in state_of(api, flow_run)["message"]
        time.sleep(WITHIN["crash runs without a heartbeat"] + RESCHEDULED)  # what must not happen has had its time
        assert state_of(api, flow_run)["name"] == "Cancelled"
    stack.up()


def test_runs_are_rescheduled_three_times_and_failures_are_reported(
    stack: LocalStack,
    api: PrefectAPI,
    tmp_path: Path,
    automations: dict[str, dict[str, Any]],
    calls: list[dict[str, Any]],
) -> None:
    failing = {"urls": str(tmp_path / "none.parquet"), "store": str(tmp_path / "store")}
    often, rarely, never = (crashed_run(api, tmp_path, started) for started in (4, 3, 0))
    failed = start_run(api, "refresh/refresh-now", failing)
    wait_for_reschedule(api, rarely)
    wait_for_state(api, rarely, "Completed", 180)
    wait_for("the failure", lambda: state_of(api, failed["id"])["name"] == "Failed", 180)
    for flow_run in (often, never):
        assert state_of(api, flow_run)["message"] == "as a test"
    texts = wait_for("four calls", lambda: [call["text"] for call in calls] if len(calls) >= 4 else [], PATIENCE)
    assert any(f"Run {failed['name']} of refresh ended as Failed" in text for text in texts)
    assert sum("of cleanup ended as Crashed: as a test" in text for text in texts) == 3


def crashed_run(api: PrefectAPI, store: Path, started: int) -> str:
    """A run of `cleanup` that the server has seen start `started` times and crash."""
    deployment = api.get("/deployments/name/cleanup/cleanup")["id"]
    body = {
        "parameters": {"store": str(store / "store"), "dry_run": True},
        "state": {"type": "PENDING"},
        "tags": ["resumable", "upkeep"],
    }
    flow_run: str = api.post(f"/deployments/{deployment}/create_flow_run", body)["id"]
    states = [{"type": "RUNNING"}, {"type": "PENDING"}] * started
    for state in [*states, {"type": "CRASHED", "message": "as a test"}]:
        api.post(f"/flow_runs/{flow_run}/set_state", {"state": state, "force": True})
    assert api.get(f"/flow_runs/{flow_run}")["run_count"] == started
    return flow_run
