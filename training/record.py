"""The configuration that a run was started with: recorded in the store, the same for whoever goes on with it."""

from __future__ import annotations

import contextlib
import time

from starflow import manifest
from starflow.checkpoints import list_steps
from starflow.errors import AlreadyExistsError, ConfigError
from starflow.objectstore import ObjectStore
from starflow.snapshots import load_snapshot
from training.architecture import check
from training.config import RESUMABLE, TrainConfig
from training.lease import Lease, LeaseHeldError
from training.processes import identity

RUN_KIND, RUN_VERSION = "run", 1
#: How long another machine that starts the run at the same time may take to record its configuration, in seconds.
RECORDING = 3.0


def resolve(store: ObjectStore, config: TrainConfig) -> TrainConfig:
    """Fixes the snapshot: the one the run was started with, else the configured one.

    The first call for a run checks its configuration and records it as ``runs/<run>/run.json``; another one takes
    its place as long as no step is committed and nobody holds the lease. Raises ConfigError when the model or the
    snapshot cannot be used or the run goes on with another configuration, NotFoundError without the snapshot.
    """
    if store.head(run_key(config.run)) is None:
        _record(store, _checked(store, config))
    try:
        return adopt(store, config)
    except ConfigError:
        _start_anew(store, config)
    return adopt(store, config)


def run_key(run: str) -> str:
    """Key of the run's configuration."""
    return f"runs/{run}/run.json"


def samples_key(run: str, step: int) -> str:
    """Key of the grid of pictures drawn after `step`."""
    return f"runs/{run}/samples/{step:09d}.png"


def list_samples(store: ObjectStore, run: str) -> list[str]:
    """Keys of the run's grids, oldest first."""
    return [info.key for info in store.list(f"runs/{run}/samples/")]


def _checked(store: ObjectStore, config: TrainConfig) -> TrainConfig:
    """With its snapshot fixed, which the model fits."""
    _, snapshot = check(store, config)
    return config.model_copy(update={"snapshot": snapshot.id})


def _record(store: ObjectStore, config: TrainConfig) -> None:
    body = {"config": config.model_dump(mode="json")}
    with contextlib.suppress(AlreadyExistsError):  # somebody else starts it, too: theirs counts
        manifest.commit(store, run_key(config.run), RUN_KIND, RUN_VERSION, body)


def adopt(store: ObjectStore, config: TrainConfig) -> TrainConfig:
    """The configuration on the run's snapshot. Raises ConfigError when the run has another one."""
    theirs = manifest.load(store, run_key(config.run), RUN_KIND, RUN_VERSION)["config"]
    newest = config.snapshot == "newest"
    snapshot = theirs["snapshot"] if newest else load_snapshot(store, config.snapshot).id
    check_same_config(config, theirs, f"run {config.run!r}")
    return config.model_copy(update={"snapshot": snapshot})


def _start_anew(store: ObjectStore, config: TrainConfig) -> None:
    """Replaces the recorded configuration unless a step is committed or somebody is at work on one.

    It holds the lease meanwhile: who takes it afterwards finds the new configuration.
    """
    lease, began = Lease(store, config.run, identity(), config.lease_seconds), time.monotonic()

    def at_work() -> bool:
        return time.monotonic() - began > RECORDING and lease.is_held()

    try:
        lease.acquire(2 * config.lease_seconds, give_up=at_work)
    except LeaseHeldError:
        return
    try:
        if list_steps(store, config.run):
            return
        checked = _checked(store, config)
        store.delete([run_key(config.run)])
        _record(store, checked)
    finally:
        lease.release()


def check_same_config(config: TrainConfig, theirs: dict[str, object], whose: str) -> None:
    """Raises ConfigError for keys that decide the result and differ from those of what is being resumed."""
    mine = config.model_dump(mode="json")
    for key in mine:
        if key not in RESUMABLE and key in theirs and mine[key] != theirs[key]:
            raise ConfigError(
                f"{whose} was started with {key}={theirs[key]}, the configuration says {key}={mine[key]}; "
                "resume with the first, or use another run name"
            )
