"""A Prefect server over plain HTTP: starting deployments, following their runs, reading their answers.

Prefect itself is not imported here; commands answer faster without it.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from starflow.errors import NotFoundError, StarflowError
from starflow.forms import answer_from_rows

#: End of the key of the table that holds a flow's answer (starflow.forms.answer_rows).
ANSWER_SUFFIX = "-answer"
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


class PrefectAPI:
    """JSON over HTTP to the server at `url` (``http://HOST:PORT/api``)."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def get(self, path: str) -> Any:
        return self._request("GET", path)

    def post(self, path: str, body: Any = None) -> Any:
        return self._request("POST", path, {} if body is None else body)

    def put(self, path: str, body: Any) -> Any:
        return self._request("PUT", path, body)

    def patch(self, path: str, body: Any) -> Any:
        return self._request("PATCH", path, body)

    def delete(self, path: str) -> None:
        self._request("DELETE", path)

    def _request(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON answer, None when there is none.

        Raises NotFoundError for a 404 and StarflowError for any other refusal or an unreachable server.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, method=method, headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            reason = f"Prefect refuses {method} {path} ({error.code}): {_detail(error.read())}"
            raise NotFoundError(reason) if error.code == 404 else StarflowError(reason) from error
        except OSError as error:
            raise StarflowError(
                f"no Prefect server answers at {self.url}; run `starflow up`, or set PREFECT_API_URL to yours"
            ) from error


def _detail(answer: bytes) -> str:
    """The server's own words in the body of a refusal."""
    text = answer.decode(errors="replace")
    try:
        body = json.loads(text)
    except ValueError:
        return text[:500]
    return str(body.get("detail", body))[:500] if isinstance(body, dict) else text[:500]


def ignore(state: str) -> None:
    """Follows nothing."""


def run_refresh_deployment(
    env: Mapping[str, str],
    parameters: Mapping[str, Any],
    on_state: Callable[[str], None] = ignore,
    *,
    deployment: str = "refresh/refresh-now",
    timeout: float = 3600.0,
) -> dict[str, Any]:
    """Runs the refresh on the worker and returns its answer: snapshot, parent, added, kept, total, dropped, seconds.

    `env` is a stack's environment (PREFECT_API_URL is read); `parameters` are fields of RefreshConfig. `on_state`
    is told, in words, whenever the run's state or progress changes.
    Raises StarflowError with the flow's own sentence when it fails, is cancelled or takes over `timeout` seconds.
    """
    return run_deployment(env["PREFECT_API_URL"], deployment, parameters, on_state, timeout=timeout)


def run_deployment(
    api_url: str,
    deployment: str,
    parameters: Mapping[str, Any],
    on_state: Callable[[str], None] = ignore,
    *,
    timeout: float,
) -> dict[str, Any]:
    """Starts `deployment` (FLOW/NAME), waits for the end of its run and returns its answer.

    An interrupt (Ctrl-C) cancels the run. Raises StarflowError as `run_refresh_deployment` does.
    """
    api = PrefectAPI(api_url)
    run = start_run(api, deployment, parameters)
    try:
        state = _follow(api, run, on_state, time.monotonic() + timeout)
    except BaseException:
        cancel_run(api, run["id"])
        raise
    if state["type"] != "COMPLETED":
        reason = own_sentence(state.get("message") or state["name"])
        raise StarflowError(f"{deployment} ended as {state['name']}: {reason} (log: {_page(api, run)})")
    return read_answer(api, run["id"])


def start_run(api: PrefectAPI, deployment: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Creates a run of `deployment`; the JSON of the run. Raises StarflowError for a refused parameter."""
    try:
        found = api.get(f"/deployments/name/{deployment}")
    except NotFoundError as error:
        raise NotFoundError(
            f"deployment {deployment} is not registered at {api.url}; run `starflow prefect bootstrap`"
        ) from error
    body = {"parameters": dict(parameters), "state": {"type": "SCHEDULED"}}
    run: dict[str, Any] = api.post(f"/deployments/{found['id']}/create_flow_run", body)
    return run


def cancel_run(api: PrefectAPI, run_id: str) -> None:
    """Stops the run: at once if it waits, else its worker ends the process."""
    waits = api.get(f"/flow_runs/{run_id}")["state"]["type"] == "SCHEDULED"
    api.post(f"/flow_runs/{run_id}/set_state", {"state": {"type": "CANCELLED" if waits else "CANCELLING"}})


def read_answer(api: PrefectAPI, run_id: str) -> dict[str, Any]:
    """The answer that a finished run left as a table. Raises NotFoundError if there is none."""
    wanted = {"flow_run_id": {"any_": [run_id]}, "key": {"like_": ANSWER_SUFFIX}}
    found = api.post("/artifacts/filter", {"artifacts": wanted, "sort": "CREATED_DESC", "limit": 1})
    if not found:
        raise NotFoundError(f"run {run_id} left no answer; see its log in the UI")
    data = found[0]["data"]
    return answer_from_rows(json.loads(data) if isinstance(data, str) else data)


def own_sentence(message: str) -> str:
    """What the flow itself said: Prefect's preamble and the name of the exception are removed."""
    _, found, own = message.partition("encountered an exception: ")
    own = own if found else message
    kind, colon, sentence = own.partition(": ")
    return sentence if colon and kind.isidentifier() else own


def _follow(api: PrefectAPI, run: dict[str, Any], on_state: Callable[[str], None], deadline: float) -> dict[str, Any]:
    """Polls until the run has ended; returns its final state."""
    last = None
    while True:
        state: dict[str, Any] = api.get(f"/flow_runs/{run['id']}")["state"]
        progress = ", ".join([state["name"], *_progress(api, run["id"])])
        if progress != last:
            on_state(progress)
            last = progress
        if state["type"] in FINAL:
            return state
        if time.monotonic() > deadline:
            raise StarflowError(f"run {run['name']} has not ended in time; it was cancelled (log: {_page(api, run)})")
        time.sleep(0.5)


def _progress(api: PrefectAPI, run_id: str) -> list[str]:
    """What the run's progress artifacts say: ``encode 60 %``."""
    wanted = {"flow_run_id": {"any_": [run_id]}, "type": {"any_": ["progress"]}}
    found = api.post("/artifacts/filter", {"artifacts": wanted, "sort": "KEY_ASC"})
    return [f"{artifact['description']} {float(artifact['data'] or 0):.0f} %" for artifact in found]


def _page(api: PrefectAPI, run: dict[str, Any]) -> str:
    return f"{api.url.removesuffix('/api')}/runs/flow-run/{run['id']}"
