"""Sets up a Prefect server: pool, limits, variables, blocks, deployments, automations; repeating it changes nothing.

What people change in the UI stays: the pool's and the stores' limits, the variable's and the blocks' values, the
deployments' parameters (but for the store, which the variable names), schedules (times, on or off), whether an
automation is on and how many seconds it waits.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from infra.prefect_client import PrefectAPI
from infra.services import POOL, last_line
from pipelines.deployment import SECRETS, STORE_VARIABLE, limit_name
from starflow.errors import NotFoundError, StarflowError

#: Flow runs that the work pool runs side by side, unless set otherwise in the UI.
RUNS_AT_ONCE = 2
ROOT = Path(__file__).resolve().parents[1]
#: Files of the checkout that decide what is registered.
DEFINITIONS = (
    "prefect.yaml",
    "infra/automations.yaml",
    "infra/train_flow.py",
    "infra/upkeep_flows.py",
    "pipelines/flows.py",
    "pipelines/captioners.py",
    "pipelines/config.py",
    "pipelines/deployment.py",
    "pipelines/recaption.py",
    "pipelines/takedown.py",
    "infra/bootstrap.py",
    "infra/cleanup.py",
    "training/config.py",
    "training/recipes.py",
    "starflow/forms.py",
)
#: Block with the address that the automation for failures calls, and the environment variable of its first value.
WEBHOOK_BLOCK, WEBHOOK_VARIABLE = "starflow-webhook", "STARFLOW_WEBHOOK_URL"
JSON = {"Content-Type": "application/json"}
#: How the names of automations begin that nobody else makes.
OURS = "starflow: "
#: Prefect variable that holds the digest of what was registered last.
DIGEST_VARIABLE = "starflow_registered"


def bootstrap(api_url: str, store: str, *, force: bool = False) -> dict[str, Any]:
    """Brings the server at `api_url` up to date. `store` is the deployments' default store unless one is set there.

    Secret blocks and the webhook's address are made from the environment (`SECRETS`, `WEBHOOK_VARIABLE`), empty where
    it has none, and never overwritten.

    Returns JSON: ``{"deployments": "registered" | "unchanged", "store", "automations": {"created", "updated",
    "removed"}}``.
    Raises StarflowError when the server refuses something or cannot be reached.
    """
    api = PrefectAPI(api_url)
    chosen = _variable(api, STORE_VARIABLE)
    if chosen is None:
        chosen = store
        _set_variable(api, STORE_VARIABLE, store)
    digest = definition_digest(chosen)
    if not force and _variable(api, DIGEST_VARIABLE) == digest:
        return {
            "deployments": "unchanged",
            "store": chosen,
            "automations": {"created": [], "updated": [], "removed": []},
        }
    _ensure_pool(api)
    _ensure_limit(api, limit_name(chosen))
    for block, variable in SECRETS.items():
        _ensure_block(api, "secret", block, {"value": os.environ.get(variable, "")})
    webhook = os.environ.get(WEBHOOK_VARIABLE, "")
    _ensure_block(api, "webhook", WEBHOOK_BLOCK, {"method": "POST", "url": webhook, "headers": JSON})
    before = _deployments(api)
    _deploy(api_url)
    _restore(api, before)
    automations = _ensure_automations(api, bool(webhook))
    _set_variable(api, DIGEST_VARIABLE, digest)
    return {"deployments": "registered", "store": chosen, "automations": automations}


def definition_digest(store: str) -> str:
    """Hash of what decides the deployments and their forms: `DEFINITIONS`, this interpreter and `store`."""
    digest = hashlib.sha256(f"{store} {sys.executable}".encode())
    for name in DEFINITIONS:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()[:32]


def _ensure_pool(api: PrefectAPI) -> None:
    """Makes the work pool, or gives one that a worker has made its limit; a limit set in the UI stays."""
    try:
        pool = api.get(f"/work_pools/{POOL}")
    except NotFoundError:
        pool = api.post("/work_pools/", {"name": POOL, "type": "process"})
    if pool["concurrency_limit"] is None:
        api.patch(f"/work_pools/{POOL}", {"concurrency_limit": RUNS_AT_ONCE})


def _ensure_limit(api: PrefectAPI, name: str) -> None:
    """Of the runs that add snapshots to a store, one at a time."""
    if name not in {limit["name"] for limit in api.post("/v2/concurrency_limits/filter")}:
        api.post("/v2/concurrency_limits/", {"name": name, "limit": 1})


def _ensure_block(api: PrefectAPI, kind: str, name: str, data: dict[str, Any]) -> None:
    """Makes the block unless there is one of that name."""
    try:
        api.get(f"/block_types/slug/{kind}/block_documents/name/{name}")
    except NotFoundError:
        block_type = api.get(f"/block_types/slug/{kind}")["id"]
        wanted = {"block_schemas": {"block_type_id": {"any_": [block_type]}}, "limit": 1}
        schema = api.post("/block_schemas/filter", wanted)[0]["id"]  # the newest comes first
        body = {"name": name, "data": data, "block_type_id": block_type, "block_schema_id": schema}
        api.post("/block_documents/", body)


def _deploy(api_url: str) -> None:
    """`prefect deploy --all` in a child: reading the flows imports half the world."""
    file = ROOT / "prefect.yaml"
    if not file.exists():
        raise StarflowError(f"{file} is missing; install the project from its checkout: pip install -e .")
    finished = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file)],
        env=os.environ | {"PREFECT_API_URL": api_url, "DO_NOT_TRACK": "1"},
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if finished.returncode:
        raise StarflowError(f"prefect deploy failed: {last_line(finished.stderr or finished.stdout)}")


def _deployments(api: PrefectAPI) -> dict[str, dict[str, Any]]:
    """Those of our pool, by id: others may use the same server."""
    ours = {"work_pools": {"name": {"any_": [POOL]}}}
    return {deployment["id"]: deployment for deployment in api.post("/deployments/filter", ours)}


def _restore(api: PrefectAPI, before: dict[str, dict[str, Any]]) -> None:
    """Gives deployments back what was changed in the UI: values that prefect.yaml does not set, and schedules."""
    for identity, deployment in _deployments(api).items():
        old = before.get(identity, {"parameters": {}, "schedules": []})
        schema = deployment["parameter_openapi_schema"]
        kept = {name: value for name, value in old["parameters"].items() if name in schema["properties"]}
        complete = {
            "parameters": kept | deployment["parameters"],
            # A misspelt name is refused when the run is made; Prefect's own schema takes it, and the run crashes.
            "parameter_openapi_schema": schema | {"additionalProperties": False},
        }
        api.patch(f"/deployments/{identity}", complete)
        there = {_name(schedule): schedule for schedule in deployment["schedules"]}
        for schedule in old["schedules"]:
            path = f"/deployments/{identity}/schedules"
            wanted = {key: schedule[key] for key in ("active", "schedule", "parameters")}
            now = there.get(_name(schedule))
            if now is None and not schedule["slug"]:  # `prefect deploy` has deleted what is not in its file
                api.post(path, [wanted])
            elif now is not None and any(now[key] != wanted[key] for key in wanted):
                api.patch(f"{path}/{now['id']}", wanted)


def _name(schedule: dict[str, Any]) -> str:
    """prefect.yaml's schedules have slugs, those that were added in the UI none."""
    return str(schedule["slug"] or schedule["id"])


def _ensure_automations(api: PrefectAPI, webhook: bool) -> dict[str, list[str]]:
    """Those that call the webhook start off without its address; ours that are no longer in the file are removed."""
    existing = {automation["name"]: automation for automation in api.post("/automations/filter")}
    done: dict[str, list[str]] = {"created": [], "updated": [], "removed": []}
    wanted_ones = yaml.safe_load((ROOT / "infra" / "automations.yaml").read_text(encoding="utf-8"))
    for wanted in wanted_ones:
        for action in wanted["actions"]:
            if full_name := action.pop("deployment", None):
                action["deployment_id"] = api.get(f"/deployments/name/{full_name}")["id"]
            if action["type"] == "call-webhook":
                block = api.get(f"/block_types/slug/webhook/block_documents/name/{WEBHOOK_BLOCK}")
                action["block_document_id"] = block["id"]
                wanted["enabled"] = webhook
        old = existing.get(wanted["name"])
        if old is None:
            api.post("/automations/", wanted)
            done["created"].append(wanted["name"])
        else:
            trigger = wanted["trigger"] | {"within": old["trigger"]["within"]}
            api.put(f"/automations/{old['id']}", wanted | {"enabled": old["enabled"], "trigger": trigger})
            done["updated"].append(wanted["name"])
    for name in existing.keys() - {wanted["name"] for wanted in wanted_ones}:
        if name.startswith(OURS):
            api.delete(f"/automations/{existing[name]['id']}")
            done["removed"].append(name)
    return done


def _variable(api: PrefectAPI, name: str) -> Any:
    try:
        return api.get(f"/variables/name/{name}")["value"]
    except NotFoundError:
        return None


def _set_variable(api: PrefectAPI, name: str, value: str) -> None:
    try:
        api.patch(f"/variables/name/{name}", {"value": value})
    except NotFoundError:
        api.post("/variables/", {"name": name, "value": value})
