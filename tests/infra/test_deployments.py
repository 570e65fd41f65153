"""A store as it is operated from Prefect, on the real server: the gate, other captions, takedown, cleaning up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from infra.prefect_client import PrefectAPI, run_deployment, start_run
from infra.stack import LocalStack
from starflow.objectstore import open_store
from starflow.snapshots import list_snapshots, load_snapshot
from tests.infra.small_work import artifacts_of, newest_run, serve_pictures, state_of, wait_for, wait_for_state
from tests.pipelines.fake_captioners import serve_endpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
SECONDS = 300.0


@pytest.fixture
def api(stack: LocalStack) -> PrefectAPI:
    return PrefectAPI(stack.state.env["PREFECT_API_URL"])


def end_of(api: PrefectAPI, flow_run: str) -> dict[str, Any]:
    """The state in which the run ends."""
    final = {"COMPLETED", "FAILED", "CANCELLED"}
    return wait_for("the end", lambda: s if (s := state_of(api, flow_run))["type"] in final else {}, SECONDS)


def paused(api: PrefectAPI, parameters: dict[str, Any]) -> str:
    """A refresh that waits for a person's decision."""
    flow_run = start_run(api, "refresh/refresh-now", parameters | {"gate": "person"})["id"]
    wait_for_state(api, flow_run, "Paused", SECONDS)
    return str(flow_run)


def decide(api: PrefectAPI, flow_run: str, decision: str) -> None:
    """What the form behind the button Resume sends."""
    answer = api.post(f"/flow_runs/{flow_run}/resume", {"run_input": {"decision": decision, "note": "looked at"}})
    assert answer["status"] == "ACCEPT", answer


def test_a_store_is_operated(stack: LocalStack, api: PrefectAPI, s3_url: str, tmp_path: Path) -> None:
    with serve_pictures(tmp_path, 20) as urls:
        parameters = {"urls": str(urls), "store": s3_url, "allow_host": ["127.0.0.1"], "actors": 1}
        the_gate_refuses(api, parameters)
        a_person_refuses_then_publishes(api, parameters)
        listed = pq.read_table(urls)["url"].to_pylist()
    other_captions(api, s3_url)
    a_picture_is_taken_down(api, s3_url, listed[0])
    a_snapshot_is_inspected(api, s3_url)
    old_snapshots_go(api, s3_url)


def the_gate_refuses(api: PrefectAPI, parameters: dict[str, Any]) -> None:
    """One of 21 pictures is missing. The run says so, its page shows the figures, and nothing is published."""
    strict = parameters | {"gate": "automatic", "gate_drop_rate": 0.01}
    flow_run = start_run(api, "refresh/refresh-now", strict)["id"]
    end = end_of(api, flow_run)
    assert end["type"] == "FAILED"
    assert "drops 4.8% (limit 1.0%; 1 of 21" in end["message"]
    page = artifacts_of(api, flow_run)
    drops = next(row for row in json.loads(page["refresh-gate"]) if row["what"] == "drops")
    assert (drops["share"], drops["passed"]) == ("4.76%", "NO")
    assert page["refresh-candidates"].startswith("data:image/png;base64,")
    assert list_snapshots(open_store(parameters["store"])) == []


def a_person_refuses_then_publishes(api: PrefectAPI, parameters: dict[str, Any]) -> None:
    """While the run waits for the decision, another refresh of the store is not needed, and says so."""
    flow_run = paused(api, parameters)
    another = start_run(api, "refresh/refresh-now", parameters)["id"]
    end = end_of(api, another)
    assert end["type"] == "CANCELLED"
    assert "Another run adds snapshots" in end["message"]
    decide(api, flow_run, "refuse")
    end = end_of(api, flow_run)
    assert end["type"] == "FAILED"
    assert "a person has refused" in end["message"]
    assert list_snapshots(open_store(parameters["store"])) == []

    flow_run = paused(api, parameters)
    decide(api, flow_run, "publish")
    assert end_of(api, flow_run)["type"] == "COMPLETED"
    assert load_snapshot(open_store(parameters["store"])).counts.total == 20


def other_captions(api: PrefectAPI, store: str) -> None:
    with serve_endpoint() as endpoint:
        parameters = {"store": store, "captioner": endpoint.url, "captioner_model": "colours"}
        answer = run_deployment(api.url, "recaption/recaption", parameters, timeout=SECONDS)
    assert (answer["captioned"], answer["total"]) == (20, 20)
    snapshot = load_snapshot(open_store(store))
    assert (snapshot.id, snapshot.parent) == (answer["snapshot"], answer["parent"])
    page = artifacts_of(api, newest_run(api, "recaption/recaption"))
    assert page["recaption-pictures"].startswith("data:image/png;base64,")
    assert len(snapshot.parts[0].captions) == 2


def a_picture_is_taken_down(api: PrefectAPI, store: str, url: str) -> None:
    """First only counted, then done; in another spelling."""
    parameters = {"store": store, "urls": [url.replace("http", "HTTP")], "dry_run": True}
    assert run_deployment(api.url, "takedown/takedown", parameters, timeout=SECONDS)["removed"] == 1
    assert len(list_snapshots(open_store(store))) == 2
    answer = run_deployment(api.url, "takedown/takedown", parameters | {"dry_run": False}, timeout=SECONDS)
    assert (answer["removed"], answer["total"]) == (1, 19)
    page = artifacts_of(api, newest_run(api, "takedown/takedown"))
    assert [row["samples"] for row in json.loads(page["takedown-rules"])] == [1]
    assert "takedown-bytes" in page


def a_snapshot_is_inspected(api: PrefectAPI, store: str) -> None:
    answer = run_deployment(api.url, "inspect/inspect", {"store": store, "read": True, "pictures": 4}, timeout=SECONDS)
    assert (answer["removed"], answer["pictures"], answer["problems"]) == (1, 4, 0)
    page = artifacts_of(api, newest_run(api, "inspect/inspect"))
    assert page["inspect-pictures"].startswith("data:image/png;base64,")


def old_snapshots_go(api: PrefectAPI, store: str) -> None:
    """First only said, then done."""
    newest = load_snapshot(open_store(store)).id
    parameters = {"store": store, "keep_snapshots": 1, "grace_hours": 1, "dry_run": True}
    assert run_deployment(api.url, "cleanup/cleanup", parameters, timeout=SECONDS)["snapshots"] == 2
    assert len(list_snapshots(open_store(store))) == 3
    answer = run_deployment(api.url, "cleanup/cleanup", parameters | {"dry_run": False}, timeout=SECONDS)
    assert (answer["snapshots"], answer["checkpoints"]) == (2, 0)
    assert [summary.id for summary in list_snapshots(open_store(store))] == [newest]
