"""The refresh as a Prefect flow: the stages of `starflow refresh`, with a page that people can read."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any, cast
from uuid import UUID

import numpy as np
from prefect import flow, get_run_logger, task
from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event

from pipelines.config import RefreshConfig
from starflow.forms import answer_rows, parameters_of
from starflow.objectstore import ObjectStore, open_store
from starflow.snapshots import Snapshot, load_snapshot

#: Emitted after the commit; the automation train-on-publish waits for it.
PUBLISHED_EVENT = "starflow.snapshot.published"
#: Samples in the picture grid of a run's page.
PICTURES = 32


@flow(name="refresh")
@parameters_of(RefreshConfig)
def refresh(**parameters: Any) -> dict[str, Any]:
    """Crawls, captions, filters and encodes what is new in a list of URLs, and publishes a snapshot."""
    from pipelines.refresh import stages  # the form needs none of its heavy imports

    config = RefreshConfig.model_validate(parameters)
    log = get_run_logger()
    plan = stages(config)
    progress = cast(UUID, create_progress_artifact(0.0, key="refresh-progress", description="starting"))
    state: dict[str, Any] = {}
    for number, stage in enumerate(plan):
        update_progress_artifact(progress, 100.0 * number / len(plan), description=stage.name)
        state = run_stage.with_options(name=stage.name, task_run_name=stage.name)(stage, state)
    update_progress_artifact(progress, 100.0, description="done")
    answer: dict[str, Any] = state["result"]
    store = open_store(config.store)
    snapshot = load_snapshot(store, answer["snapshot"])
    if answer["added"] or snapshot.parent is None:
        announce(store, snapshot)
    else:
        log.info("nothing new: %s stays the newest snapshot", snapshot.id)
    show(store, snapshot, answer)
    return answer


@task(cache_policy=NO_CACHE)  # the stages keep their own durable record
def run_stage(stage: Any, state: dict[str, Any]) -> dict[str, Any]:
    """One stage; `state` is what the stages before it have left."""
    result: dict[str, Any] = stage.run(state)
    return result


def announce(store: ObjectStore, snapshot: Snapshot) -> None:
    """Tells the server's automations that `snapshot` is committed."""
    emit_event(
        PUBLISHED_EVENT,
        resource={"prefect.resource.id": f"starflow.store.{store.url}", "prefect.resource.name": store.url},
        payload={"snapshot": snapshot.id, "store": store.url, "total": snapshot.counts.total},
    )


@task(name="report", cache_policy=NO_CACHE)
def show(store: ObjectStore, snapshot: Snapshot, answer: Mapping[str, Any]) -> None:
    """Artifacts: answer, drops by reason, difference to the parent, pictures with captions."""
    create_table_artifact(answer_rows(answer), key="refresh-answer", description=f"Snapshot {snapshot.id}")
    drops = sorted(answer["dropped"].items(), key=lambda item: -item[1])
    create_table_artifact(
        [{"reason": reason, "samples": count} for reason, count in drops],
        key="refresh-drops",
        description="What this refresh rejected, by reason",
    )
    parent = load_snapshot(store, snapshot.parent) if snapshot.parent else None
    create_markdown_artifact(difference(parent, snapshot), key="refresh-difference", description="Against the parent")
    create_image_artifact(
        picture_grid_uri(store, snapshot),
        key="refresh-pictures",
        description=f"Newest samples, decoded from their latents. {snapshot.attribution or ''}".strip(),
    )


def difference(parent: Snapshot | None, snapshot: Snapshot) -> str:
    """Markdown: what `snapshot` has that its parent has not."""
    rows = [
        ("samples", parent.counts.total if parent else 0, snapshot.counts.total),
        ("parts", len(parent.parts) if parent else 0, len(snapshot.parts)),
        ("image shapes", len(_grids(parent)) if parent else 0, len(_grids(snapshot))),
    ]
    lines = [f"| | {parent.id if parent else 'nothing'} | {snapshot.id} | |", "|---|---:|---:|---:|"]
    lines += [f"| {what} | {old:,} | {new:,} | {new - old:+,} |" for what, old, new in rows]
    return "\n".join(lines)


def picture_grid_uri(store: ObjectStore, snapshot: Snapshot) -> str:
    """The newest samples of the most frequent shape, decoded, with captions, as a data URI (PNG)."""
    import tempfile
    from pathlib import Path

    import torch

    from starflow.encoders import load_vae, to_pixels
    from starflow.images import picture_grid
    from starflow.reader import SnapshotReader

    with tempfile.TemporaryDirectory() as cache:
        reader = SnapshotReader(store, snapshot, Path(cache))
        grid = max(reader.grids, key=reader.count)
        newest = np.arange(max(0, reader.count(grid) - PICTURES), reader.count(grid))
        batch = reader.gather(grid, newest)
        captions = list(batch.captions)
        latents = torch.from_numpy(batch.mean).float()
    pixels = to_pixels(load_vae(snapshot.vae.name).decode(latents))
    picture = picture_grid(list(pixels), captions, scale=max(1, 96 // pixels.shape[1]))
    encoded = io.BytesIO()
    picture.save(encoded, "png")
    return "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode()


def _grids(snapshot: Snapshot) -> set[tuple[int, int]]:
    return {part.grid for part in snapshot.parts}
