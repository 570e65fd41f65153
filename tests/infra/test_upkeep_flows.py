"""Looking into a store and taking samples out of it, through server and worker as the UI starts it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from prefect.utilities.callables import parameter_schema

from infra.prefect_client import PrefectAPI, run_deployment, start_run
from infra.stack import LocalStack
from infra.upkeep_flows import InspectConfig, inspect, takedown
from pipelines.takedown import TakedownConfig
from starflow.config import Config
from starflow.encoders import load_vae
from starflow.errors import StarflowError
from starflow.objectstore import open_store
from starflow.parts import LayerPlan, part_from_arrays
from starflow.snapshots import Snapshot, load_snapshot, publish, snapshot_numbers

FORMS: dict[str, tuple[Any, type[Config]]] = {
    "inspect": (inspect, InspectConfig),
    "takedown": (takedown, TakedownConfig),
}
FORM = Path(__file__).with_name("upkeep_forms.json")


def forms() -> dict[str, Any]:
    """The forms as the UI gets them."""
    return {name: parameter_schema(flow).model_dump_for_openapi() for name, (flow, _) in FORMS.items()}


def test_forms_have_not_changed_unnoticed() -> None:
    """After a wanted change: `python tests/infra/test_upkeep_flows.py` rewrites the snapshot."""
    assert forms() == json.loads(FORM.read_text())


@pytest.mark.parametrize("name", FORMS)
def test_forms_are_flat_and_explain_every_field(name: str) -> None:
    form, model = forms()[name], FORMS[name][1]
    assert list(form["properties"]) == list(model.model_fields)
    assert form["required"] == ["store"]
    for key, field in form["properties"].items():
        assert (field["title"], field["description"]) == (
            model.model_fields[key].title,
            model.model_fields[key].description,
        )


def sample_id(host: str, number: int) -> str:
    return hashlib.sha256(f"{host}{number}".encode()).hexdigest()


@pytest.fixture
def store(s3_url: str) -> str:
    """Two snapshots: four pictures of host a.example, then also four of b.example."""
    opened, vae = open_store(s3_url), load_vae("emoji").identity
    parent: Snapshot | None = None
    parts = []
    for host in ("a", "b"):
        latents = np.random.default_rng(len(parts)).normal(size=(4, vae.channels, 4, 4)).astype(np.float16)
        numbers = range(4)
        table = pa.table(
            {
                "id": [sample_id(host, n) for n in numbers],
                "url": [f"http://{host}.example/{n}" for n in numbers],
            }
        )
        layer = (LayerPlan(origin="alt-text", version="1"), [f"picture {n}" for n in numbers])
        parts.append(part_from_arrays(opened, vae, latents, np.ones_like(latents), table, [layer]))
        parent = publish(opened, parent=parent, parts=parts, image_size=8, attribution="by somebody")
    return s3_url


def artifacts(api: PrefectAPI, deployment: str) -> dict[str, dict[str, Any]]:
    """By key, those of the deployment's newest run."""
    wanted = {"deployments": {"name": {"any_": [deployment]}}, "sort": "START_TIME_DESC", "limit": 1}
    run = api.post("/flow_runs/filter", wanted)[0]
    found = api.post("/artifacts/filter", {"flow_runs": {"id": {"any_": [run["id"]]}}, "sort": "KEY_ASC"})
    return {artifact["key"]: artifact for artifact in found}


@pytest.mark.timeout(1500)  # four runs of flows, each of which has its own limit
def test_a_takedown_counts_first_and_cleanup_erases(stack: LocalStack, store: str) -> None:
    """Then nothing is left of what was taken down, and inspect finds the snapshot whole."""
    url, opened = stack.state.env["PREFECT_API_URL"], open_store(store)
    api = PrefectAPI(url)
    named = {"store": store, "hosts": ["A.example."], "urls": ["HTTP://b.example:80/3"], "ids": [sample_id("b", 2)]}
    counted = run_deployment(url, "takedown/takedown", named | {"dry_run": True}, timeout=300)
    assert (counted["removed"], counted["total"], snapshot_numbers(opened)) == (6, 8, [1, 2])
    answer = run_deployment(url, "takedown/takedown", named, timeout=300)
    newest = load_snapshot(opened)
    assert (answer["snapshot"], answer["removed"], answer["total"]) == (newest.id, 6, 2)
    page = artifacts(api, "takedown")
    rules = {row["rule"]: row["samples"] for row in json.loads(page["takedown-rules"]["data"])}
    assert rules == {"host a.example": 4, "url http://b.example/3": 1, f"id {sample_id('b', 2)}": 1}
    assert "in 2 withdrawn parts" in page["takedown-bytes"]["data"]

    cleaned = run_deployment(url, "cleanup/cleanup", {"store": store, "compact": True}, timeout=300)
    assert (cleaned["snapshots"], cleaned["parts_after"]) == (2, 1)
    assert not [part for part in newest.withdrawn if any(opened.list(f"parts/{part}/"))]
    seen = run_deployment(url, "inspect/inspect", {"store": store, "read": True}, timeout=300)
    assert (seen["snapshot"], seen["total"], seen["pictures"], seen["problems"]) == (newest.id, 2, 2, 0)
    page = artifacts(api, "inspect")
    assert "has been deleted" in page["inspect-difference"]["data"]
    assert page["inspect-problems"]["data"] == "All 1 parts are there and intact."
    assert page["inspect-pictures"]["data"].startswith("data:image/png;base64,")
    assert page["inspect-pictures"]["description"].endswith("by somebody")


def test_inspect_compares_with_the_parent_and_fails_for_a_damaged_snapshot(stack: LocalStack, store: str) -> None:
    url, opened = stack.state.env["PREFECT_API_URL"], open_store(store)
    newest = load_snapshot(opened)
    key = next(info.key for info in opened.list(f"parts/{newest.parts[1].id}/") if "/mean/c/" in info.key)
    opened.delete([key])
    with pytest.raises(StarflowError, match=f"inspect/inspect ended as Failed: snapshot {newest.id} has 1 problems"):
        run_deployment(url, "inspect/inspect", {"store": store}, timeout=300)
    page = artifacts(PrefectAPI(url), "inspect")
    assert f"{key} is missing" in page["inspect-problems"]["data"]
    compared = {row["what"]: row[newest.id] for row in json.loads(page["inspect-difference"]["data"])}
    assert (compared["added"], compared["samples"]) == ("4", "8")


def test_bad_values_are_refused_by_the_server(stack: LocalStack) -> None:
    api = PrefectAPI(stack.state.env["PREFECT_API_URL"])
    for deployment, parameters, name in (
        ("inspect/inspect", {"pictures": 0}, "pictures"),
        ("takedown/takedown", {"hosts": "a.example"}, "hosts"),
    ):
        with pytest.raises(StarflowError, match=name):
            start_run(api, deployment, parameters)


if __name__ == "__main__":
    FORM.write_text(json.dumps(forms(), indent=1) + "\n")
