"""Submit, find, watch and stop launches, whatever the target."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from infra.launch.common import (
    Launch,
    LaunchConfig,
    Launcher,
    Node,
    default_python,
    folder_key,
    record,
    train_command,
    with_all_ranks,
)
from starflow.errors import NotFoundError, StarflowError
from starflow.objectstore import open_store
from training.cluster import stop_key
from training.config import TrainConfig

#: Seconds between looks at machines that were asked to stop.
LOOK_EVERY = 0.25


class AlreadyLaunchedError(StarflowError):
    """The run's newest launch is still at work."""


def launcher(launch: LaunchConfig) -> Launcher:
    """The target's launcher. Raises ConfigError for settings that cannot be used."""
    if launch.on == "slurm":
        from infra.launch.slurm import SlurmLauncher

        return SlurmLauncher(launch)
    if launch.on == "kubernetes":
        from infra.launch.kubernetes import KubernetesLauncher

        return KubernetesLauncher(launch)
    if launch.on == "ray":
        from infra.launch.ray import RayLauncher

        return RayLauncher(launch)
    from infra.launch.hosts import LocalLauncher, SshLauncher

    return LocalLauncher(launch) if launch.on == "local" else SshLauncher(launch)


def prepare(config: TrainConfig, launch: LaunchConfig) -> tuple[Launch, TrainConfig]:
    """What would be launched, and the run on all its ranks; starts and stores nothing."""
    now = datetime.now(UTC)
    identity = f"{now:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"
    config = with_all_ranks(config, launch)
    store = open_store(config.store).url
    url = f"{store}/{folder_key(config.run, identity)}/config.json"
    prepared = Launch(
        id=identity,
        run=config.run,
        store=store,
        submitted=now.isoformat(timespec="milliseconds"),
        launch=launch,
        ranks=config.ranks,
        handle={},
        command=train_command(launch.cluster.get("python") or default_python(launch.on), url),
    )
    return prepared, config


def submit(config: TrainConfig, launch: LaunchConfig) -> Launch:
    """Launches the run, or its continuation, and returns at once.

    Raises ConfigError when run and launch do not fit, or the run was started with another configuration;
    AlreadyLaunchedError when its newest launch is still at work.
    """
    from training.record import resolve

    target = launcher(launch)
    if running := active(config.store, config.run):
        raise AlreadyLaunchedError(
            f"run {config.run!r} was launched at {running.submitted} on {running.launch.on} and is still at work; "
            f"stop it first: starflow launch stop {config.run} --store {config.store}"
        )
    prepared, config = prepare(config, launch)
    config = resolve(open_store(config.store), config)
    key = f"{folder_key(config.run, prepared.id)}/config.json"
    open_store(config.store).write(key, config.model_dump_json(indent=1).encode())
    try:
        submitted = prepared.model_copy(update={"handle": target.submit(prepared)})
        record(submitted)
    except BaseException:  # machines that have started all the same find this, and leave
        open_store(config.store).write(stop_key(prepared.run, prepared.id), b"")
        raise
    return submitted


def newest(store: str, run: str) -> Launch:
    """The run's newest launch. Raises NotFoundError when it was never launched."""
    opened = open_store(store)
    keys = [info.key for info in opened.list(f"runs/{run}/launches/") if info.key.endswith("/launch.json")]
    if not keys:
        raise NotFoundError(f"run {run!r} was never launched from {opened.url}; see starflow runs list --store {store}")
    return Launch.model_validate(json.loads(opened.read(max(keys))))


def active(store: str, run: str) -> Launch | None:
    """The run's newest launch if any of its machines is at work or waits to be."""
    try:
        launch = newest(store, run)
    except NotFoundError:
        return None
    return launch if _alive(launcher(launch.launch).nodes(launch)) else None


def status(launch: Launch) -> dict[str, Any]:
    """Machines and run, as JSON types.

    alive: whether a machine is at work or waits to be. state: pending, running, completed, preempted, failed, or
    interrupted (it ended and nobody said why). message: what the supervisor said last.
    """
    from training.run_commands import describe_run

    nodes = launcher(launch.launch).nodes(launch)
    run = describe_run(launch.store, launch.run)
    events = [event for event in run["events"] if event["time"] >= launch.submitted]
    alive, unknown = _alive(nodes), any(node.state == "unknown" for node in nodes)
    return {
        "run": launch.run,
        "launch": launch.id,
        "on": launch.launch.on,
        "store": launch.store,
        "submitted": launch.submitted,
        "ranks": launch.ranks,
        "nodes": [node.model_dump() for node in nodes],
        "alive": alive,
        "state": run["state"] if unknown else _state(alive, run["state"], bool(events)),
        "step": run["step"],
        "steps": run["steps"],
        "message": events[-1]["message"] if events else "",
    }


def logs(launch: Launch, node: int = 0, follow: bool = False) -> Iterator[str]:
    """Lines of a machine's log; with `follow` until its supervisor has ended."""
    if node >= launch.launch.nodes:
        raise NotFoundError(
            f"launch {launch.id} has {launch.launch.nodes} machines, numbered from 0; there is no {node}"
        )
    return launcher(launch.launch).logs(launch, node, follow)


def stop(launch: Launch, seconds: float = 60.0) -> dict[str, Any]:
    """Asks every machine to save and leave for good; ends those that have not after `seconds`. Returns the status."""
    target = launcher(launch.launch)
    open_store(launch.store).write(stop_key(launch.run, launch.id), b"")
    target.stop(launch, force=False)
    if not _wait_until_ended(target, launch, seconds):
        target.stop(launch, force=True)
        _wait_until_ended(target, launch, 10.0)
    return status(launch)


def _wait_until_ended(target: Launcher, launch: Launch, seconds: float) -> bool:
    deadline, pause = time.monotonic() + seconds, LOOK_EVERY
    while _alive(target.nodes(launch)):
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2.0, 1.5 * pause)
    return True


def _alive(nodes: list[Node]) -> bool:
    return any(node.state in ("pending", "running") for node in nodes)


def _state(alive: bool, run: str, begun: bool) -> str:
    """The launch's state from the run's, which may be an earlier launch's until this one has `begun`."""
    if alive:
        return "running" if begun and run == "running" else "pending"
    if begun and run != "running":
        return run
    return "completed" if run == "completed" else "interrupted"
