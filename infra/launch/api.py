"""Submit, find, watch and stop launches, whatever the target."""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
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
from starflow.console import console
from starflow.errors import NotFoundError, StarflowError, StoreError
from starflow.objectstore import open_store
from training.cluster import stop_key
from training.config import TrainConfig
from training.events import read_events
from training.lease import Lease, LeaseHeldError
from training.processes import describe, identity

#: Seconds between looks at machines that were asked to stop; until killed ones are gone; to hand a launch over.
LOOK_EVERY, KILL_SECONDS, SUBMIT_SECONDS = 0.25, 10.0, 90.0
#: Seconds for which a request to stop waits for a store that does not answer, before machines are asked themselves.
REQUEST_SECONDS = 3.0


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
    name = f"{now:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"
    config = with_all_ranks(config, launch)
    store = open_store(config.store).url
    url = f"{store}/{folder_key(config.run, name)}/config.json"
    prepared = Launch(
        id=name,
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
    AlreadyLaunchedError when its newest launch is still at work, or another one is being submitted.
    """
    target = launcher(launch)
    with_all_ranks(config, launch)  # refused before anything is written
    with _alone(config):
        if running := active(config.store, config.run):
            raise AlreadyLaunchedError(
                f"run {config.run!r} was launched at {running.submitted} on {running.launch.on} and "
                f"{_why_at_work(running)}; stop it first: starflow launch stop {config.run} --store {config.store}"
            )
        return _hand_over(target, *prepare(config, launch))


@contextmanager
def _alone(config: TrainConfig) -> Iterator[None]:
    """One submits a run at a time: of two, the second waits, and finds the first at work."""
    lease = Lease(open_store(config.store), config.run, identity(), SUBMIT_SECONDS, name="submitting")
    try:
        lease.acquire(True, lambda _: console.print(f"run {config.run!r} is being launched; waiting"))
    except LeaseHeldError as error:
        owner, _ = lease.holder() or ("somebody", 0.0)
        raise AlreadyLaunchedError(
            f"run {config.run!r} is being launched by {describe(owner)} all the while; "
            f"see starflow launch status {config.run} --store {config.store}"
        ) from error
    try:
        yield
    finally:
        with contextlib.suppress(StoreError):  # it falls silent by itself; the launch stands
            lease.release()


def _hand_over(target: Launcher, prepared: Launch, config: TrainConfig) -> Launch:
    from training.record import resolve

    store = open_store(config.store)
    config = resolve(store, config)
    store.write(_config_key(prepared), config.model_dump_json(indent=1).encode())
    try:
        submitted = prepared.model_copy(update={"handle": target.submit(prepared)})
        record(submitted)
    except BaseException:  # machines that have started all the same find this, and leave
        store.write(stop_key(prepared.run, prepared.id), b"")
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
    """The run's newest launch if any of its machines is at work or waits to be, or may: see `status`."""
    try:
        launch = newest(store, run)
    except NotFoundError:
        return None
    return launch if _alive(launch, _nodes(launch)) else None


def status(launch: Launch) -> dict[str, Any]:
    """Machines and run, as JSON types.

    alive: whether a machine is at work or waits to be; of those that cannot be asked, the store tells: the run is
    being written, or has not begun and nobody asked it to stop. unreachable: machines of which nobody can say
    whether they have ended. state: pending, running, completed, preempted, failed, or interrupted (it ended and
    nobody said why). message: what the supervisor said last.
    """
    from training.run_commands import describe_run

    nodes = _nodes(launch)
    run = describe_run(launch.store, launch.run)
    events = [event for event in run["events"] if event["time"] >= launch.submitted]
    alive = _alive(launch, nodes)
    steps = _config(launch)["steps"]  # a continuation may have more than the run had before
    state = _state(alive, run["state"], bool(events), (run["step"] or 0) >= steps)
    said_end = bool(events) and state in ("completed", "preempted", "failed")
    alone = launch.launch.on == "local" or launch.launch.nodes == 1  # what the one machine said of its end counts
    unsure = [] if said_end and alone else [node for node in nodes if node.state == "unknown"]
    return {
        "run": launch.run,
        "launch": launch.id,
        "on": launch.launch.on,
        "store": launch.store,
        "submitted": launch.submitted,
        "ranks": launch.ranks,
        "nodes": [node.model_dump() for node in nodes],
        "alive": alive,
        "unreachable": [node.node for node in unsure],
        "state": state,
        "step": run["step"],
        "steps": steps,
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
    """Asks every machine to save and leave for good; ends those that have not after `seconds`. Returns the status.

    The request is in the store, too: machines that cannot be asked from here leave when they see it. May be repeated.
    Raises StoreError when the store did not take it, after the machines that can be asked from here have left.
    """
    try:
        open_store(launch.store, patience=REQUEST_SECONDS).write(stop_key(launch.run, launch.id), b"")
    finally:
        _end(launch, force=False)
        if not _wait_until_ended(launch, seconds):
            _end(launch, force=True)
            _wait_until_ended(launch, KILL_SECONDS)
    return status(launch)


def _end(launch: Launch, force: bool) -> None:
    with contextlib.suppress(StarflowError):  # its machines show as unreachable, with the same words
        launcher(launch.launch).stop(launch, force)


def _wait_until_ended(launch: Launch, seconds: float) -> bool:
    deadline, pause = time.monotonic() + seconds, LOOK_EVERY
    while not _has_ended(launch):
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2.0, 1.5 * pause)
    return True


def _has_ended(launch: Launch) -> bool:
    try:
        return not _alive(launch, _nodes(launch))
    except StoreError:  # neither the target nor the store can say
        return False


def _nodes(launch: Launch) -> list[Node]:
    """The machines as the target knows them; "unknown" where it cannot be asked."""
    try:
        return launcher(launch.launch).nodes(launch)
    except StarflowError as error:
        return [Node(node=node, host="", state="unknown", detail=str(error)) for node in range(launch.launch.nodes)]


def _alive(launch: Launch, nodes: list[Node]) -> bool:
    if any(node.state in ("pending", "running") for node in nodes):
        return True
    return any(node.state == "unknown" for node in nodes) and _may_be_at_work(launch)


def _config(launch: Launch) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(open_store(launch.store).read(_config_key(launch)))
    return config


def _config_key(launch: Launch) -> str:
    return f"{folder_key(launch.run, launch.id)}/config.json"


def _may_be_at_work(launch: Launch) -> bool:
    """What the store says of machines that cannot be asked."""
    store = open_store(launch.store)
    if Lease(store, launch.run, "").is_held():
        return True
    begun = any(event["time"] >= launch.submitted for event in read_events(store, launch.run))
    return not begun and store.head(stop_key(launch.run, launch.id)) is None


def _why_at_work(launch: Launch) -> str:
    silent = [node for node in _nodes(launch) if node.state == "unknown"]
    if not silent:
        return "is still at work"
    return f"may be at work on machine {silent[0].node}, which cannot be asked ({silent[0].detail})"


def _state(alive: bool, run: str, begun: bool, done: bool) -> str:
    """The launch's state from the run's, which may be an earlier launch's until this one has `begun`.

    done: whether the launch's own last step is committed.
    """
    if alive:
        return "running" if begun and run == "running" else "pending"
    if run == "completed":
        return "completed" if done else "interrupted"
    return run if begun and run != "running" else "interrupted"
