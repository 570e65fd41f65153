"""Retention over a whole store: old snapshots and what nothing refers to, and checkpoints that need not stay."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from pipelines.garbage import collect
from starflow.checkpoints import list_runs
from starflow.compaction import compact
from starflow.config import Config
from starflow.objectstore import ObjectStore
from training.record import recorded
from training.retention import prune


class CleanupConfig(Config):
    """What may go."""

    store: str = Field(title="Store", description="Store to clean: a folder or s3://BUCKET/PREFIX.", min_length=1)
    keep_snapshots: int | None = Field(
        None,
        title="Snapshots to keep",
        description="Only the newest so many stay; null: all. A run cannot go on once its snapshot is deleted.",
        ge=1,
        le=100_000,
    )
    grace_hours: float = Field(
        168.0,
        title="Grace period in hours",
        description="Objects that nothing refers to stay for so long: a refresh may be writing them.",
        ge=1,
        le=8760,
    )
    keep_checkpoints: int | None = Field(
        None,
        title="Checkpoints to keep",
        description="The newest so many of each run stay, and its best; null: what the run's own settings say.",
        ge=1,
        le=100_000,
    )
    compact: bool = Field(
        False,
        title="Merge small parts",
        description="First publish a snapshot of the same samples in few large parts, if nightly refreshes have left "
        "many small ones, which read slowly.",
    )
    dry_run: bool = Field(False, title="Dry run", description="Only say what would be deleted.")


def clean_snapshots(store: ObjectStore, config: CleanupConfig) -> dict[str, Any]:
    """Merges small parts if asked for, then deletes snapshots and unreferenced objects; JSON with counts.

    A merge goes on top of whatever is published meanwhile, and a refresh at work goes on top of the merge.
    """
    parts = {}
    if config.compact and not config.dry_run:
        done = compact(store)
        parts = {"parts_before": done.before, "parts_after": done.after}
    garbage, scrubbed = collect(store, config.keep_snapshots, config.grace_hours, config.dry_run)
    return parts | {
        "snapshots": len(garbage.snapshots),
        "objects": garbage.objects,
        "bytes": garbage.bytes,
        "waiting": len(garbage.waiting),
        "unfinished": garbage.unfinished,
        "scrubbed": scrubbed,
    }


def clean_runs(store: ObjectStore, config: CleanupConfig) -> dict[str, list[int]]:
    """Deletes checkpoints; the steps deleted of each run that loses some."""
    gone = {}
    for run in list_runs(store):
        own = recorded(store, run)
        newest = config.keep_checkpoints or own["keep_newest"]
        if steps := prune(store, run, newest, own["keep_every"], config.dry_run):
            gone[run] = steps
    return gone
