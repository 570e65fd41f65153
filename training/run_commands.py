"""`starflow runs`: list, show, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

runs = typer.Typer(help="List, show and compare training runs.", no_args_is_help=True)
Store = Annotated[str, typer.Option(help="Object store: s3://bucket/prefix or a folder.", envvar="STARFLOW_STORE")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


@runs.command("list")
def list_(store: Store, as_json: AsJson = False) -> None:
    """All runs of a store, with their state."""
    from starflow.checkpoints import list_runs
    from starflow.console import print_json
    from starflow.objectstore import open_store

    opened = open_store(store)
    found = [_brief(opened.url, run) for run in list_runs(opened)]
    if as_json:
        print_json(found)
        return
    for run in found:
        if run["message"]:
            print(f"{run['run']:24} {run['state']:10} {run['message']}")
            continue
        done = "no checkpoint" if run["step"] is None else f"step {run['step']}"
        print(f"{run['run']:24} {run['state']:10} {done} of {run['steps']}  preset {run['preset']}")


def _brief(store: str, run: str) -> dict[str, Any]:
    """What ``starflow runs list --json`` prints of a run; message: why it is unreadable, if it is."""
    from starflow.errors import StoreError, UnavailableError

    try:
        return describe_run(store, run, brief=True) | {"message": None}
    except UnavailableError:
        raise
    except StoreError as error:  # of another release, perhaps: no reason to hide the others
        unknown = dict.fromkeys(("step", "steps", "preset", "snapshot"))
        return {"run": run, "store": store, "state": "unreadable", **unknown, "message": str(error)}


@runs.command()
def show(run: str, store: Store, as_json: AsJson = False) -> None:
    """State, last committed step, events and metrics of a run."""
    from starflow.console import print_json, show_value

    found = describe_run(store, run)
    if as_json:
        print_json(found)
        return
    for key in ("run", "state", "step", "steps", "preset", "snapshot", "restarts", "held_out_bits_per_dim", "metrics"):
        print(f"{key:22} {show_value(found[key])}")
    for key in found["sample_grids"][-1:]:
        print(f"{'newest samples':22} {found['store']}/{key}")
    for event in found["events"]:
        print(f"  {event['time']}  {event['message']}")


@runs.command()
def compare(
    names: Annotated[list[str], typer.Argument(help="Runs to compare.")],
    store: Store,
    out: Annotated[Path, typer.Option(help="Picture to write.")] = Path("runs.png"),
    as_json: AsJson = False,
) -> None:
    """Curves of several runs in one picture, and where their configurations differ."""
    from starflow.console import print_json, show_value
    from starflow.objectstore import open_store
    from training.curves import compare_configs, draw_curves

    opened = open_store(store)
    described = {name: describe_run(store, name) for name in names}
    draw_curves(opened, names, out)
    answer: dict[str, dict[str, Any]] = {
        "differences": compare_configs(opened, names),
        "runs": {name: {k: d[k] for k in ("state", "step", "held_out_bits_per_dim")} for name, d in described.items()},
    }
    if as_json:
        print_json(answer | {"picture": str(out)})
        return
    for name, values in answer["runs"].items():
        bits = values["held_out_bits_per_dim"]
        print(f"{name:24} {values['state']:10} step {values['step']}  held out {show_value(bits)}")
    for key, values in answer["differences"].items():
        print(f"{key}: " + ", ".join(f"{name}={value}" for name, value in values.items()))
    print(out)


def describe_run(store: str, run: str, brief: bool = False) -> dict[str, Any]:
    """What ``starflow runs show --json`` prints. Raises NotFoundError for an unknown run.

    state: completed, running, preempted, failed, or interrupted (nobody writes it, nobody said why).
    step: last committed one, None before the first. metrics: local path of metrics.jsonl up to that step.
    sample_grids: keys of the pictures drawn for held-out captions while it trained, oldest first.
    """
    from starflow.checkpoints import list_steps
    from starflow.errors import NotFoundError
    from starflow.objectstore import open_store
    from training.events import read_events
    from training.record import list_samples, newest_checkpoint, recorded

    opened = open_store(store)
    try:
        config = recorded(opened, run)
    except NotFoundError as error:
        raise NotFoundError(f"run {run!r} is not in {opened.url}; see starflow runs list --store {store}") from error
    events = read_events(opened, run)  # first: a run that says that it has completed has its last step
    steps = list_steps(opened, run)
    found: dict[str, Any] = {
        "run": run,
        "store": opened.url,
        "state": _state(opened, run, config["steps"], steps, events),
        "step": steps[-1] if steps else None,
        "steps": config["steps"],
        "preset": config["preset"],
        "snapshot": config["snapshot"],
    }
    if brief:
        return found
    newest = newest_checkpoint(opened, run)
    return found | {
        "samples": newest.progress.samples if newest else 0,
        "held_out_bits_per_dim": newest.progress.held_out_bits if newest else None,
        "skipped": newest.progress.skipped if newest else 0,
        "restarts": sum(event["kind"] == "relaunch" for event in events),
        "checkpoints": steps,
        "sample_grids": list_samples(opened, run),
        "metrics": _local_metrics(opened, run, newest),
        "metrics_url": f"{opened.url}/runs/{run}/metrics.jsonl" if newest else None,
        "events": events,
        "config": config,
    }


def _state(store: Any, run: str, total: int, steps: list[int], events: list[dict[str, Any]]) -> str:
    from training.lease import Lease

    last = events[-1] if events else {"kind": "", "step": None}
    if last["kind"] in ("completed", "preempted", "failed"):
        return str(last["kind"])
    if Lease(store, run, "").is_held():
        return "running"
    # An attempt that went on from the newest step had more to do, whatever the configuration of that step says.
    return "completed" if steps and steps[-1] >= total and steps[-1] != last["step"] else "interrupted"


def _local_metrics(store: Any, run: str, newest: Any) -> str | None:
    """Where this machine can read the metrics: in a local store, or a fresh copy in the cache."""
    from starflow.objectstore import LocalStore
    from training.config import default_cache

    key = f"runs/{run}/metrics.jsonl"
    if newest is None or store.head(key) is None:
        return None
    if isinstance(store, LocalStore):
        return str(store.path(key))
    path = default_cache() / "metrics" / run / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    store.download(key, path)
    return str(path)
