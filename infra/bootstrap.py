"""Registers the project's deployments, limits and automations on a Prefect server; repeating it changes nothing.

What people change in the UI stays: schedules (times, on or off) and whether an automation is on.
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
from starflow.errors import NotFoundError, StarflowError

#: Flow runs that the work pool runs side by side, unless set otherwise in the UI.
RUNS_AT_ONCE = 2
ROOT = Path(__file__).resolve().parents[1]
#: Files of the checkout that decide what is registered.
DEFINITIONS = (
    "prefect.yaml",
    "infra/automations.yaml",
    "infra/flows.py",
    "pipelines/flows.py",
    "pipelines/config.py",
    "training/config.py",
    "training/recipes.py",
    "starflow/forms.py",
)
#: Prefect variable that holds the digest of what was registered last.
DIGEST_VARIABLE = "starflow_registered"


def bootstrap(api_url: str, store: str, *, force: bool = False) -> dict[str, Any]:
    """Brings the server at `api_url` up to date; `store` becomes the deployments' default store.

    Returns JSON: ``{"deployments": "registered" | "unchanged", "automations": {"created", "updated"}}``.
    Raises StarflowError when the server refuses something or cannot be reached.
    """
    api = PrefectAPI(api_url)
    digest = definition_digest(store)
    if not force and _variable(api, DIGEST_VARIABLE) == digest:
        return {"deployments": "unchanged", "automations": {"created": [], "updated": []}}
    _ensure_pool(api)
    schedules = _schedules(api)
    _deploy(api_url, store)
    _restore(api, schedules)
    automations = _ensure_automations(api)
    _set_variable(api, DIGEST_VARIABLE, digest)
    return {"deployments": "registered", "automations": automations}


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


def _deploy(api_url: str, store: str) -> None:
    """`prefect deploy --all` in a child: reading the flows imports half the world."""
    file = ROOT / "prefect.yaml"
    if not file.exists():
        raise StarflowError(f"{file} is missing; install the project from its checkout: pip install -e .")
    finished = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file)],
        env=os.environ | {"PREFECT_API_URL": api_url, "STARFLOW_STORE": store, "DO_NOT_TRACK": "1"},
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if finished.returncode:
        raise StarflowError(f"prefect deploy failed: {last_line(finished.stderr or finished.stdout)}")


def _schedules(api: PrefectAPI) -> dict[tuple[str, str], dict[str, Any]]:
    """(deployment id, slug) -> schedule and whether it is on."""
    found = {}
    for deployment in api.post("/deployments/filter"):
        for schedule in deployment["schedules"]:
            if schedule["slug"]:
                found[deployment["id"], schedule["slug"]] = schedule
    return found


def _restore(api: PrefectAPI, before: dict[tuple[str, str], dict[str, Any]]) -> None:
    for (deployment, slug), schedule in _schedules(api).items():
        old = before.get((deployment, slug))
        if old is not None and any(old[key] != schedule[key] for key in ("active", "schedule")):
            wanted = {"active": old["active"], "schedule": old["schedule"]}
            api.patch(f"/deployments/{deployment}/schedules/{schedule['id']}", wanted)


def _ensure_automations(api: PrefectAPI) -> dict[str, list[str]]:
    existing = {automation["name"]: automation for automation in api.post("/automations/filter")}
    done: dict[str, list[str]] = {"created": [], "updated": []}
    for wanted in yaml.safe_load((ROOT / "infra" / "automations.yaml").read_text(encoding="utf-8")):
        for action in wanted["actions"]:
            if full_name := action.pop("deployment", None):
                action["deployment_id"] = api.get(f"/deployments/name/{full_name}")["id"]
        old = existing.get(wanted["name"])
        if old is None:
            api.post("/automations/", wanted)
            done["created"].append(wanted["name"])
        else:
            api.put(f"/automations/{old['id']}", wanted | {"enabled": old["enabled"]})
            done["updated"].append(wanted["name"])
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
