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
from infra.stack import LocalStack
from pipelines.deployment import SECRETS, STORE_VARIABLE, limit_name
from starflow.errors import NotFoundError, StarflowError

DEFINED = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]


@pytest.fixture
def api(stack: LocalStack) -> PrefectAPI:
    return PrefectAPI(stack.state.env["PREFECT_API_URL"])


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


def block(api: PrefectAPI, kind: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = api.get(f"/block_types/slug/{kind}/block_documents/name/{name}?include_secrets=true")
    return found


def test_limits_variable_and_blocks_are_made(api: PrefectAPI, stack: LocalStack) -> None:
    assert api.get(f"/variables/name/{STORE_VARIABLE}")["value"] == stack.state.store
    assert api.get(f"/v2/concurrency_limits/{quote(limit_name(stack.state.store))}")["limit"] == 1
    assert {block(api, "secret", name)["data"]["value"] for name in SECRETS} == {""}
    webhook = block(api, "webhook", WEBHOOK_BLOCK)["data"]
    assert (webhook["method"], webhook["url"], webhook["headers"]) == ("POST", "", {"Content-Type": "application/json"})


@pytest.fixture
def changed(api: PrefectAPI) -> Iterator[dict[str, Any]]:
    """A deployment, an automation and a secret as changed by people in the UI; an automation of earlier days."""
    deployment = api.get("/deployments/name/refresh/refresh-nightly")
    schedule = deployment["schedules"][0]
    path = f"/deployments/{deployment['id']}"
    automation = next(a for a in api.post("/automations/filter") if a["name"] == "starflow: data are stale")
    secret = block(api, "secret", next(iter(SECRETS)))["id"]
    writable = {key: automation[key] for key in ("name", "enabled", "trigger", "actions")}
    patient = {"enabled": False, "trigger": automation["trigger"] | {"within": 604800.0}}
    later = {"active": True, "schedule": {"cron": "15 4 * * *", "timezone": "Europe/Paris"}}
    api.patch(f"{path}/schedules/{schedule['id']}", later)
    noon = {"active": False, "schedule": {"cron": "0 12 * * *", "timezone": "UTC"}}
    api.post(f"{path}/schedules", [noon])
    api.patch(path, {"parameters": {"urls": "list.parquet", "store": "s3://old", "contact": "me@example.org"}})
    api.put(f"/automations/{automation['id']}", writable | patient)
    api.post("/automations/", writable | {"name": "starflow: of earlier days"})
    api.patch(f"/block_documents/{secret}", {"data": {"value": "mine"}})
    yield automation
    for now in api.get(path)["schedules"]:
        if now["slug"]:
            api.patch(f"{path}/schedules/{now['id']}", {"active": False, "schedule": schedule["schedule"]})
        else:
            api.delete(f"{path}/schedules/{now['id']}")
    api.patch(path, {"parameters": deployment["parameters"]})
    api.put(f"/automations/{automation['id']}", writable)
    api.patch(f"/block_documents/{secret}", {"data": {"value": ""}})


def test_bootstrap_keeps_what_was_changed_in_the_ui(
    api: PrefectAPI, changed: dict[str, Any], stack: LocalStack
) -> None:
    answer = bootstrap(api.url, "s3://elsewhere", force=True)
    assert answer["store"] == stack.state.store, "the variable counts"
    assert answer["automations"]["created"] == []
    assert answer["automations"]["removed"] == ["starflow: of earlier days"]
    deployment = api.get("/deployments/name/refresh/refresh-nightly")
    schedules = {schedule["schedule"]["cron"]: schedule["active"] for schedule in deployment["schedules"]}
    assert schedules == {"15 4 * * *": True, "0 12 * * *": False}
    assert deployment["parameters"] == {
        "urls": "list.parquet",
        "store": stack.state.store,
        "contact": "me@example.org",
    }
    automation = api.get(f"/automations/{changed['id']}")
    assert (automation["enabled"], automation["trigger"]["within"]) == (False, 604800.0)
    assert block(api, "secret", next(iter(SECRETS)))["data"]["value"] == "mine"
    assert bootstrap(api.url, stack.state.store)["deployments"] == "unchanged"


@pytest.mark.parametrize(("name", "value"), [("image_size", 1), ("imagesize", 64)])
def test_bad_parameter_is_refused_before_a_run_exists(api: PrefectAPI, name: str, value: int) -> None:
    with pytest.raises(StarflowError, match=name):
        start_run(api, "refresh/refresh-now", {"urls": "list.parquet", name: value})


def test_unknown_deployment_says_how_to_register_it(api: PrefectAPI) -> None:
    with pytest.raises(NotFoundError, match="starflow prefect bootstrap"):
        start_run(api, "refresh/never-made", {})


def test_missing_server_is_one_sentence() -> None:
    with pytest.raises(StarflowError, match=r"no Prefect server answers at http://127.0.0.1:9/api.*starflow up"):
        run_deployment("http://127.0.0.1:9/api", "refresh/refresh-now", {}, timeout=1)
