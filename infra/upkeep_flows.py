"""Looking into a store, taking samples out of it and cleaning it up, as Prefect flows."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from pydantic import Field

from infra.cleanup import CleanupConfig, clean_runs, clean_snapshots
from pipelines.flows import secrets_to_environment
from pipelines.preview import decode_samples
from pipelines.report import compared, damaged, data_uri, facts
from pipelines.takedown import TakedownConfig, TakedownResult, bytes_left
from pipelines.takedown import takedown as take_down
from starflow.config import Config
from starflow.errors import NotFoundError
from starflow.forms import answer_rows, parameters_of
from starflow.objectstore import ObjectStore, open_store
from starflow.snapshots import Snapshot, load_snapshot
from starflow.upkeep import difference, verify

#: Rows of a table for people; more are counted.
ROWS = 100


@flow(name="takedown")
@parameters_of(TakedownConfig)
def takedown(**parameters: Any) -> dict[str, Any]:
    """Counts the samples that are named, then publishes a snapshot without them, into which they never come back.

    It waits for nobody: a refresh at work ends with an error at its end, and leaves them out when it is run again.
    """
    secrets_to_environment()
    config = TakedownConfig.model_validate(parameters)
    done = takedown_task.with_options(name="count", task_run_name="count")(config.model_copy(update={"dry_run": True}))
    get_run_logger().info("%d of %d samples of snapshot %s are named", done.removed, done.total, done.snapshot)
    rows = [{"rule": rule, "samples": count} for rule, count in done.rules.items()]
    create_table_artifact(
        rows[:ROWS],
        key="takedown-rules",
        description=f"Samples of {done.snapshot} by what names them; {max(0, len(rows) - ROWS)} more rules",
    )
    if not config.dry_run:
        done = takedown_task.with_options(name="takedown", task_run_name="takedown")(config)
        create_markdown_artifact(
            bytes_left(done, config.store), key="takedown-bytes", description="From when no bytes are left"
        )
    answer = done.model_dump(exclude={"rules"}) | {"dry_run": config.dry_run}
    create_table_artifact(answer_rows(answer), key="takedown-answer", description=f"Snapshot {done.snapshot}")
    return answer


@task(cache_policy=NO_CACHE)
def takedown_task(config: TakedownConfig) -> TakedownResult:
    """The count or the takedown."""
    return take_down(config)


class InspectConfig(Config):
    """Which snapshot to look into, and how closely."""

    store: str = Field(title="Store", description="Where snapshots live: a folder or s3://BUCKET/PREFIX.", min_length=1)
    snapshot: str = Field("newest", title="Snapshot", description="Id, number, or newest.", min_length=1)
    compare_with: str = Field(
        "", title="Compare with", description="Id or number of another snapshot; empty: the snapshot's parent."
    )
    read: bool = Field(
        False,
        title="Read every byte",
        description="Compare checksums, too; else that all objects are there, and their sizes.",
    )
    pictures: int = Field(32, title="Pictures", description="Random samples to decode.", ge=1, le=1024)
    seed: int = Field(0, title="Seed", description="Which random samples.", ge=0)
    vae: str | None = Field(
        None, title="VAE", description="Where to find the snapshot's VAE, if not under its name: a path or id."
    )


@flow(name="inspect")
@parameters_of(InspectConfig)
def inspect(**parameters: Any) -> dict[str, Any]:
    """Shows a snapshot, its difference to another and some of its pictures, and verifies it; fails if it is damaged."""
    secrets_to_environment()
    config = InspectConfig.model_validate(parameters)
    store = open_store(config.store)
    snapshot = load_snapshot(store, config.snapshot)
    rows = [{"what": what, "value": value} for what, value in facts(snapshot)]
    create_table_artifact(rows, key="inspect-snapshot", description=f"Snapshot {snapshot.id}")
    answer: dict[str, Any] = {"snapshot": snapshot.id, "total": snapshot.counts.total}
    answer |= compare_task(store, snapshot, config.compare_with)
    problems = verify_task(store, snapshot, config.read)
    if not problems:
        answer["pictures"] = pictures_task(store, snapshot, config)
    answer["problems"] = len(problems)
    create_table_artifact(answer_rows(answer), key="inspect-answer", description=f"Snapshot {snapshot.id}")
    if problems:
        raise damaged(snapshot, problems)
    return answer


@task(name="compare", task_run_name="compare", cache_policy=NO_CACHE)
def compare_task(store: ObjectStore, snapshot: Snapshot, other: str) -> dict[str, Any]:
    """The difference to another snapshot, or to the parent if that is still there; samples added and removed."""
    name = other or snapshot.parent
    try:
        old = load_snapshot(store, name) if name else None
    except NotFoundError:
        if other:
            raise
        old = None
    if old is None:
        text = f"Its parent {name} has been deleted." if name else "It is the first snapshot of its store."
        create_markdown_artifact(text, key="inspect-difference", description="Against the parent")
        return {}
    found = difference(store, old, snapshot)
    rows = [{"what": what, old.id: before, snapshot.id: after} for what, before, after in compared(found)]
    create_table_artifact(rows, key="inspect-difference", description=f"{snapshot.id} against {old.id}")
    return {"compared_with": old.id, "added": found.added, "removed": found.removed}


@task(name="verify", task_run_name="verify", cache_policy=NO_CACHE)
def verify_task(store: ObjectStore, snapshot: Snapshot, read: bool) -> list[str]:
    """What is wrong with the snapshot's objects, one sentence each."""
    problems = verify(store, snapshot, read)
    lines = [f"- {problem}" for problem in problems[:ROWS]]
    if len(problems) > ROWS:
        lines.append(f"- and {len(problems) - ROWS:,} more")
    good = f"All {len(snapshot.parts):,} parts are there" + (" and intact." if read else ", of the right sizes.")
    create_markdown_artifact("\n".join(lines) or good, key="inspect-problems", description="Verification")
    return problems


@task(name="pictures", task_run_name="pictures", cache_policy=NO_CACHE)
def pictures_task(store: ObjectStore, snapshot: Snapshot, config: InspectConfig) -> int:
    """Decodes some samples, one artifact for each shape; returns how many."""
    with tempfile.TemporaryDirectory(prefix="starflow-inspect-") as cache:
        previews = decode_samples(store, snapshot, Path(cache), config.pictures, config.seed, config.vae)
    for preview in previews:
        encoded = io.BytesIO()
        preview.picture().save(encoded, "png")
        what = f"Samples of {snapshot.id} with latents {preview.name}. {snapshot.attribution or ''}".strip()
        create_image_artifact(data_uri(encoded.getvalue()), key="inspect-pictures", description=what)
    return sum(len(preview.pixels) for preview in previews)


@flow(name="cleanup")
@parameters_of(CleanupConfig)
def cleanup(**parameters: Any) -> dict[str, Any]:
    """Deletes what no snapshot or checkpoint needs any more; safe beside refreshes and runs whose snapshot stays."""
    secrets_to_environment()
    config = CleanupConfig.model_validate(parameters)
    store = open_store(config.store)
    snapshots = snapshots_task(store, config)
    runs = runs_task(store, config)
    answer = snapshots | {"checkpoints": sum(map(len, runs.values())), "dry_run": config.dry_run}
    create_table_artifact(answer_rows(answer), key="cleanup-answer", description=f"Cleaned {config.store}")
    rows = [{"run": run, "steps": ", ".join(map(str, steps))} for run, steps in runs.items()]
    create_table_artifact(rows, key="cleanup-checkpoints", description="Checkpoints deleted, by run")
    return answer


@task(name="snapshots", task_run_name="snapshots", cache_policy=NO_CACHE)
def snapshots_task(store: ObjectStore, config: CleanupConfig) -> dict[str, Any]:
    """Old snapshots and unreferenced objects."""
    return clean_snapshots(store, config)


@task(name="checkpoints", task_run_name="checkpoints", cache_policy=NO_CACHE)
def runs_task(store: ObjectStore, config: CleanupConfig) -> dict[str, list[int]]:
    """Checkpoints of all runs."""
    return clean_runs(store, config)
