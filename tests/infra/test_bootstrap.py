"""Deployments, schedules and automations on the real server; the files they come from."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
import yaml

from infra.bootstrap import ROOT, WEBHOOK_BLOCK, bootstrap
from infra.prefect_client import PrefectAPI, run_deployment, start_run
from infra.processes import wait_until
from infra.stack import LocalStack
from pipelines.deployment import SECRETS, STORE_VARIABLE, limit_name
from starflow.errors import NotFoundError, StarflowError

DEFINED = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]


@pytest.fixture
def api(stack: LocalStack) -> PrefectAPI:
    return PrefectAPI(stack.state.env["PREFECT_API_URL"])


@pytest.fixture
def nightly(api: PrefectAPI) -> Iterator[dict[str, Any]]:
    """The nightly schedule, turned on for one test."""
    deployment = api.get("/deployments/name/refresh/refresh-nightly")
    schedule = deployment["schedules"][0]
    assert schedule["active"] is False
    path = f"/deployments/{deployment['id']}/schedules/{schedule['id']}"
    api.patch(path, {"active": True, "schedule": {"cron": "15 4 * * *", "timezone": "Europe/Paris"}})
    yield deployment
    api.patch(path, {"active": False, "schedule": schedule["schedule"]})


@pytest.mark.parametrize("entrypoint", sorted({deployment["entrypoint"] for deployment in DEFINED}))
def test_entry_points_are_flows_named_after_their_function(entrypoint: str) -> None:
    module, _, name = entrypoint.rpartition(".")
    assert getattr(importlib.import_module(module), name).name == name


def test_every_deployment_is_registered(api: PrefectAPI) -> None:
    assert {d["name"] for d in api.post("/deployments/filter")} == {d["name"] for d in DEFINED}


def test_every_deployment_runs_as_it_is_registered(api: PrefectAPI, stack: LocalStack) -> None:
    """Every default is allowed by its form, and the store is the variable's value."""
    for deployment in api.post("/deployments/filter"):
        schema = deployment["parameter_openapi_schema"]
        assert deployment["parameters"] == {"store": stack.state.store}
        for name, field in schema["properties"].items():
            assert {"title", "description", "position"} <= field.keys(), f"{deployment['name']}: {name}"
            assert "default" in field or name in schema["required"], f"{deployment['name']}: {name}"
        given = {name: "x" for name in schema["required"]} | deployment["parameters"]
        answer = api.post("/ui/schemas/validate", {"schema": schema, "values": given})
        assert answer == {"errors": [], "valid": True}, deployment["name"]


def test_limits_variable_and_blocks_are_made_once(api: PrefectAPI, stack: LocalStack) -> None:
    def value(kind: str, name: str) -> Any:
        path = f"/block_types/slug/{kind}/block_documents/name/{name}?include_secrets=true"
        return api.get(path)["data"]

    assert api.get(f"/variables/name/{STORE_VARIABLE}")["value"] == stack.state.store
    assert api.get(f"/v2/concurrency_limits/{quote(limit_name(stack.state.store))}")["limit"] == 1
    assert set(value("secret", name)["value"] for name in SECRETS) == {""}
    assert value("webhook", WEBHOOK_BLOCK) == {"method": "POST", "url": ""} | value("webhook", WEBHOOK_BLOCK)

    name = next(iter(SECRETS))
    document = api.get(f"/block_types/slug/secret/block_documents/name/{name}")
    api.patch(f"/block_documents/{document['id']}", {"data": {"value": "mine"}})
    api.patch(f"/variables/name/{STORE_VARIABLE}", {"value": "s3://elsewhere"})
    try:
        assert bootstrap(api.url, stack.state.store)["store"] == "s3://elsewhere"
        assert value("secret", name)["value"] == "mine"
        assert api.get("/deployments/name/refresh/refresh-now")["parameters"] == {"store": "s3://elsewhere"}
    finally:
        api.patch(f"/variables/name/{STORE_VARIABLE}", {"value": stack.state.store})
        api.patch(f"/block_documents/{document['id']}", {"data": {"value": ""}})
    assert bootstrap(api.url, stack.state.store)["deployments"] == "registered"
    assert bootstrap(api.url, stack.state.store)["deployments"] == "unchanged"


def test_active_schedule_gets_runs(api: PrefectAPI, nightly: dict[str, Any]) -> None:
    """With sqlalchemy 2.1 the scheduler creates none, silently."""
    wanted = {
        "deployments": {"id": {"any_": [nightly["id"]]}},
        "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
    }
    assert wait_until(lambda: bool(api.post("/flow_runs/filter", wanted)), seconds=60, every=0.5)


def test_bootstrap_keeps_what_was_changed_in_the_ui(
    api: PrefectAPI, nightly: dict[str, Any], stack: LocalStack
) -> None:
    automation = next(a for a in api.post("/automations/filter") if a["name"] == "train-on-publish")
    assert automation["enabled"] is False
    api.patch(f"/automations/{automation['id']}", {"enabled": True})
    answer = bootstrap(api.url, stack.state.store, force=True)
    assert answer["automations"]["created"] == []
    schedule = api.get("/deployments/name/refresh/refresh-nightly")["schedules"][0]
    assert schedule["active"]
    assert schedule["schedule"]["cron"] == "15 4 * * *"
    assert api.get(f"/automations/{automation['id']}")["enabled"] is True
    api.patch(f"/automations/{automation['id']}", {"enabled": False})
    assert bootstrap(api.url, stack.state.store)["deployments"] == "unchanged"


def test_bad_parameter_is_refused_before_a_run_exists(api: PrefectAPI) -> None:
    with pytest.raises(StarflowError, match="image_size"):
        start_run(api, "refresh/refresh-now", {"urls": "list.parquet", "image_size": 1})


def test_unknown_deployment_says_how_to_register_it(api: PrefectAPI) -> None:
    with pytest.raises(NotFoundError, match="starflow prefect bootstrap"):
        start_run(api, "refresh/never-made", {})


def test_missing_server_is_one_sentence() -> None:
    with pytest.raises(StarflowError, match=r"no Prefect server answers at http://127.0.0.1:9/api.*starflow up"):
        run_deployment("http://127.0.0.1:9/api", "refresh/refresh-now", {}, timeout=1)
