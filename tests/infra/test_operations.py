"""A day's work on the real server: a snapshot starts a training, which is cancelled, retried, killed, and completes."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from infra.prefect_client import PrefectAPI, cancel_run, run_refresh_deployment, start_run
from infra.stack import LocalStack
from starflow.checkpoints import list_steps
from starflow.errors import StarflowError
from starflow.objectstore import open_store
from tests.infra.small_work import (
    SMALL_RUN,
    at_work_on,
    committed_steps,
    process_of,
    serve_pictures,
    state_of,
    training_on_publish,
    training_started_by,
    wait_for,
    wait_for_reschedule,
    wait_for_state,
)


@pytest.fixture
def api(stack: LocalStack) -> PrefectAPI:
    return PrefectAPI(stack.state.env["PREFECT_API_URL"])


def upcoming(api: PrefectAPI, deployment: dict[str, Any]) -> int:
    wanted = {
        "deployments": {"id": {"any_": [deployment["id"]]}},
        "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
    }
    return int(api.post("/flow_runs/count", wanted))


def test_a_schedule_can_be_turned_on_paused_and_resumed(api: PrefectAPI) -> None:
    deployment = api.get("/deployments/name/cleanup/cleanup")
    schedule = f"/deployments/{deployment['id']}/schedules/{deployment['schedules'][0]['id']}"
    assert upcoming(api, deployment) == 0
    for _ in range(2):
        api.patch(schedule, {"active": True})
        wait_for("a scheduled run", lambda: upcoming(api, deployment), 60)
        api.patch(schedule, {"active": False})
        wait_for("an empty schedule", lambda: not upcoming(api, deployment), 60)


def test_bad_values_are_refused_by_the_server(api: PrefectAPI) -> None:
    bad = {
        "refresh/refresh-now": ({"urls": "list.parquet", "gate": "perhaps"}, "gate"),
        "backfill/backfill": ({"lists": "lists/", "gate_drop_rate": 1.5}, "gate_drop_rate"),
        "recaption/recaption": ({"weight": -1}, "weight"),
        "train/train": ({"run": "a", "nodes": 0}, "nodes"),
        "cleanup/cleanup": ({"keep_snapshots": 0}, "keep_snapshots"),
    }
    for deployment, (parameters, name) in bad.items():
        with pytest.raises(StarflowError, match=name):
            start_run(api, deployment, parameters)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_refresh_event_train_cancel_retry_kill_complete(
    stack: LocalStack, api: PrefectAPI, s3_url: str, tmp_path: Path
) -> None:
    parameters = {"store": s3_url, "allow_host": ["127.0.0.1"], "actors": 1}
    with serve_pictures(tmp_path, 40) as urls, training_on_publish(api):
        answer = run_refresh_deployment(stack.state.env, parameters | {"urls": str(urls)}, timeout=600)
        flow_run = training_started_by(api, answer["snapshot"])["id"]
        run = f"on-{answer['snapshot'][:12]}"
        store = open_store(s3_url)

        wait_for("a checkpoint", lambda: list_steps(store, run), 300)
        assert at_work_on(stack, run)
        cancel_run(api, flow_run)
        asked = time.monotonic()
        wait_for("the end of all processes", lambda: not at_work_on(stack, run), 60)
        print(f"cancelled: no process left after {time.monotonic() - asked:.1f} s")
        wait_for_state(api, flow_run, "Cancelled", 60)
        steps = list_steps(store, run)
        assert steps[-1] < SMALL_RUN["steps"]

        retry(api, flow_run)  # what the button Retry of the UI does
        wait_for("a later checkpoint", lambda: list_steps(store, run)[-1] > steps[-1], 300)
        # Not the flow's own folder: that goes with it, and no rank starts in a folder that is gone.
        assert {process.cwd() for process in at_work_on(stack, run)} == {str(Path.home())}
        process_of(stack, flow_run).send_signal(signal.SIGKILL)
        wait_for("the crash", lambda: state_of(api, flow_run)["type"] == "CRASHED", 60)
        wait_for_reschedule(api, flow_run)
        wait_for_state(api, flow_run, "Completed", 600)
        assert committed_steps(s3_url, run) == list(range(1, SMALL_RUN["steps"] + 1))
        assert at_work_on(stack, run) == []
        assert api.get(f"/flow_runs/{flow_run}")["run_count"] == 3, (
            "started, retried, rescheduled after the crash: once"
        )


def retry(api: PrefectAPI, flow_run: str) -> None:
    state = {"type": "SCHEDULED", "name": "AwaitingRetry", "message": "Retried by a person"}
    api.post(f"/flow_runs/{flow_run}/set_state", {"state": state, "force": True})
