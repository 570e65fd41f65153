"""A run's configuration: recorded in the store, and with it the snapshot, the same for whoever goes on with the run."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from starflow import manifest
from starflow.checkpoints import Checkpoint, list_steps, load_manifest
from starflow.errors import AlreadyExistsError, ConfigError, CorruptError, NotFoundError
from starflow.objectstore import ObjectStore
from starflow.snapshots import Snapshot, load_snapshot
from training.architecture import check
from training.config import RESUMABLE, TrainConfig
from training.lease import Lease, LeaseHeldError
from training.processes import identity

RUN_KIND, RUN_VERSION = "run", 1
#: How long another machine that starts the run at the same time may take to record its configuration, in seconds.
RECORDING = 3.0


def resolve(store: ObjectStore, config: TrainConfig) -> TrainConfig:
    """Fixes the snapshot: a run trains on the one that it was started with.

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


def recorded(store: ObjectStore, run: str) -> dict[str, Any]:
    """The configuration that the run has come to: of its newest checkpoint, before the first of ``run.json``.

    Raises NotFoundError for an unknown run.
    """
    if newest := newest_checkpoint(store, run):
        return newest.config
    return dict(manifest.load(store, run_key(run), RUN_KIND, RUN_VERSION)["config"])


def newest_checkpoint(store: ObjectStore, run: str) -> Checkpoint | None:
    """The newest whose manifest is not damaged, if any. Raises StoreError for one of another release."""
    steps = list_steps(store, run)
    for step in reversed(steps):
        try:
            return load_manifest(store, run, step)
        except CorruptError:
            continue
        except NotFoundError:  # pruned since: a newer one has taken its place
            if list_steps(store, run) == steps:
                raise
            return newest_checkpoint(store, run)
    return None


def adopt(store: ObjectStore, config: TrainConfig) -> TrainConfig:
    """The configuration on the run's snapshot. Raises ConfigError when the run has another one."""
    theirs = recorded(store, config.run)
    own = config.snapshot in ("newest", theirs["snapshot"])
    snapshot = theirs["snapshot"] if own else load_snapshot(store, config.snapshot).id
    config = config.model_copy(update={"snapshot": snapshot})
    check_same_config(config, theirs)
    return config


def own_snapshot(store: ObjectStore, config: TrainConfig) -> Snapshot:
    """The snapshot of an adopted configuration. Raises ConfigError when it has been deleted."""
    try:
        return load_snapshot(store, config.snapshot)
    except NotFoundError as error:
        has_weights = bool(list_steps(store, config.run))
        weights = f", from this one's weights: init_from={config.store}/{config.run}" if has_weights else ""
        raise ConfigError(
            f"run {config.run!r} trains on snapshot {config.snapshot}, which {store.url} does not hold any more; start "
            f"another run on one that is there{weights}"
        ) from error


def _start_anew(store: ObjectStore, config: TrainConfig) -> None:
    """Replaces the recorded configuration unless a step is committed or somebody is at work on one.

    It holds the lease meanwhile: who takes it afterwards finds the new configuration.
    """
    lease, began = Lease(store, config.run, identity(), config.lease_seconds), time.monotonic()

    def at_work() -> bool:
        return time.monotonic() - began > RECORDING and lease.is_held()

    try:
        lease.acquire(wait=True, give_up=at_work)
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


def check_same_config(config: TrainConfig, theirs: dict[str, Any]) -> None:
    """Raises ConfigError for keys that decide the result and differ from those of what is being resumed."""
    mine = config.model_dump(mode="json")
    theirs = {"order_block": 256, "order_window": 64} | theirs  # recorded before they could be chosen
    for key in mine:
        if key not in RESUMABLE and key in theirs and mine[key] != theirs[key]:
            raise ConfigError(
                f"run {config.run!r} was started with {key}={theirs[key]}, the configuration says {key}={mine[key]}; "
                "resume with the first, or start another run (from this one's weights: "
                f"init_from={config.store}/{config.run})"
            )
