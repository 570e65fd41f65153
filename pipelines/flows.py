"""The refresh as a Prefect flow: the stages of `starflow refresh`, with a page that people can read."""

from __future__ import annotations

import base64
import io
import tempfile
import time
from pathlib import Path
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
from pipelines.refresh import STAGES, RefreshResult, Stage, result, run_stage
from pipelines.state import RefreshState
from starflow.forms import answer_rows, parameters_of
from starflow.objectstore import ObjectStore
from starflow.snapshots import Snapshot, load_snapshot

#: Emitted after the commit; the automation train-on-publish waits for it.
PUBLISHED_EVENT = "starflow.snapshot.published"
#: Samples in the picture grid of a run's page.
PICTURES = 32


@flow(name="refresh")
@parameters_of(RefreshConfig)
def refresh(**parameters: Any) -> dict[str, Any]:
    """Crawls, captions, filters and encodes what is new in a list of URLs, and publishes a snapshot."""
    config = RefreshConfig.model_validate(parameters)
    page = RunPage()
    with tempfile.TemporaryDirectory(prefix="starflow-refresh-") as work:
        state = RefreshState(config, Path(work), page.on_event)
        for stage in STAGES:
            stage_task.with_options(name=stage.name, task_run_name=stage.name)(state, stage)
        answer = result(state)
    snapshot = load_snapshot(state.store, answer.snapshot)
    if answer.snapshot != (state.parent.id if state.parent else None):
        announce(state.store, snapshot)
    page.finish()
    report(state.store, snapshot, answer)
    return answer.model_dump()


@task(cache_policy=NO_CACHE)  # the stages keep a durable record of their own
def stage_task(state: RefreshState, stage: Stage) -> dict[str, Any]:
    """One stage; returns its counts."""
    return run_stage(state, stage)


class RunPage:
    """What the run's page shows while it works: progress, and the batches that were crawled."""

    def __init__(self) -> None:
        first = create_progress_artifact(0.0, key="refresh-progress", description="starting")
        self._artifact = cast(UUID, first)
        self._order = [stage.name for stage in STAGES]
        self._written = 0.0
        self._batches: list[dict[str, Any]] = []

    def on_event(self, event: dict[str, Any]) -> None:
        """Takes the events of pipelines.refresh; progress is written at most once a second."""
        log = get_run_logger()
        if event["event"] == "progress":
            total = event["total"]
            if time.monotonic() - self._written >= 1.0:
                part = event["done"] / total if total else 0.0
                self._write(event["stage"], part, f"{event['stage']}: {event['done']} of {total or 'unknown'}")
        elif event["event"] == "stage" and event["state"] == "started":
            self._write(event["stage"], 0.0, event["stage"])
        elif event["event"] == "stage":
            log.info("%s took %.1f s: %s", event["stage"], event["seconds"], event["counts"])
            if event["stage"] == "crawl" and self._batches:
                create_table_artifact(self._batches, key="refresh-batches", description="Batches crawled")
        elif event["event"] == "batch":
            statuses = event["statuses"] | {f"dropped: {reason}": n for reason, n in event["reasons"].items()}
            self._batches.append({"batch": event["batch"], **statuses})

    def finish(self) -> None:
        update_progress_artifact(self._artifact, 100.0, description="published")

    def _write(self, stage: str, part: float, description: str) -> None:
        self._written = time.monotonic()
        percent = 100.0 * (self._order.index(stage) + min(part, 1.0)) / len(self._order)
        update_progress_artifact(self._artifact, percent, description=description)


def announce(store: ObjectStore, snapshot: Snapshot) -> None:
    """Tells the server's automations that `snapshot` is committed."""
    emit_event(
        PUBLISHED_EVENT,
        resource={"prefect.resource.id": f"starflow.store.{store.url}", "prefect.resource.name": store.url},
        payload={"snapshot": snapshot.id, "store": store.url, "total": snapshot.counts.total},
    )


@task(cache_policy=NO_CACHE)
def report(store: ObjectStore, snapshot: Snapshot, answer: RefreshResult) -> None:
    """Artifacts: answer, drops by reason, difference to the parent, pictures with captions."""
    create_table_artifact(answer_rows(answer.model_dump()), key="refresh-answer", description=f"Snapshot {snapshot.id}")
    drops = sorted(answer.dropped.items(), key=lambda item: -item[1])
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
