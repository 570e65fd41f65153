"""What the pages of runs and the command line show of snapshots: facts, differences, rejects, pictures."""

from __future__ import annotations

import base64
import io
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipelines.drops import drop_samples
from starflow.errors import CorruptError
from starflow.objectstore import ObjectStore
from starflow.snapshots import Snapshot
from starflow.upkeep import Difference


def facts(snapshot: Snapshot) -> list[tuple[str, str]]:
    """What there is to say of a snapshot, as (what, value)."""
    grids: dict[tuple[int, int], int] = {}
    layers: dict[str, int] = {}
    for part in snapshot.parts:
        grids[part.grid] = grids.get(part.grid, 0) + part.count
        for layer in part.captions:
            text = f", states of {layer.text.encoder.name}" if layer.text else ""
            key = f"{layer.origin} {layer.version} (weight {layer.weight:g}{text})"
            layers[key] = layers.get(key, 0) + 1
    down = snapshot.vae.downsampling
    shapes = [f"{width * down} x {height * down}: {count:,}" for (height, width), count in sorted(grids.items())]
    return [
        ("parent", snapshot.parent or "none"),
        ("created", snapshot.created),
        ("samples", f"{snapshot.counts.total:,} ({snapshot.counts.added:,} added)"),
        ("parts", f"{len(snapshot.parts):,}"),
        ("pictures, width x height", "\n".join(shapes)),
        ("VAE", f"{snapshot.vae.name} ({snapshot.vae.sha256[:12]})"),
        ("captions", "\n".join(f"{layer} in {count} parts" for layer, count in sorted(layers.items()))),
        ("dropped", "\n".join(f"{reason}: {count:,}" for reason, count in sorted(snapshot.dropped.items()))),
        ("sources", "\n".join(f"{source}: {count:,}" for source, count in sorted(snapshot.sources.items()))),
        ("versions", "\n".join(f"{what}: {version}" for what, version in sorted(snapshot.versions.items()))),
        ("attribution", snapshot.attribution or ""),
    ]


def compared(found: Difference) -> list[tuple[str, str, str]]:
    """(what, in the old snapshot, in the new one) of a comparison sample by sample."""
    rows = [("added", "", f"{found.added:,}"), ("removed", f"{found.removed:,}", "")]
    rows += [("samples", f"{found.total[0]:,}", f"{found.total[1]:,}")]
    rows += [(f"latents {grid}", f"{before:,}", f"{after:,}") for grid, (before, after) in found.grids.items()]
    return [*rows, ("parts of one only", f"{len(found.parts_removed):,}", f"{len(found.parts_added):,}")]


def damaged(snapshot: Snapshot, problems: Sequence[str]) -> CorruptError:
    """The error for a snapshot with these problems."""
    return CorruptError(f"snapshot {snapshot.id} has {len(problems)} problems; restore these objects or go back")


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


def drops_table(store: ObjectStore, refresh: str) -> str:
    """Markdown: a few of what the refresh rejected, by reason, with thumbnails of what was fetched."""
    rows = []
    for reason, drops in drop_samples(store, refresh).items():
        for drop in drops:
            picture = f"![]({data_uri(drop.thumbnail, 'jpeg')})" if drop.thumbnail else ""
            url = " ".join(drop.url.split()).replace("`", "%60").replace("|", "\\|")
            rows.append(f"| {reason} | {picture} | {_escaped(drop.detail)} | `{url}` |")
    table = "\n".join(["| reason | picture | detail | URL |", "|---|---|---|---|", *rows])
    return table if rows else "Nothing was rejected."


def _escaped(text: str) -> str:
    """A text from the web as Markdown that shows just it: no picture is fetched, no link made, no cell ended."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", " ".join(text.split()))


def newest_pictures(store: ObjectStore, snapshot: Snapshot, count: int) -> bytes | None:
    """PNG: the `count` newest samples of the most frequent shape, decoded, with captions; None without a sample."""
    import torch

    from starflow.encoders import load_vae, to_pixels
    from starflow.images import picture_grid
    from starflow.reader import SnapshotReader

    with tempfile.TemporaryDirectory() as cache:
        reader = SnapshotReader(store, snapshot, Path(cache))
        grid = max(reader.grids, key=reader.count, default=None)
        if grid is None or not reader.count(grid):
            return None
        newest = np.arange(max(0, reader.count(grid) - count), reader.count(grid))
        batch = reader.gather(grid, newest)
        captions = list(batch.captions)
        latents = torch.from_numpy(batch.mean).float()
    pixels = to_pixels(load_vae(snapshot.vae.name).decode(latents))
    encoded = io.BytesIO()
    picture_grid(list(pixels), captions, scale=max(1, 96 // pixels.shape[1])).save(encoded, "png")
    return encoded.getvalue()


def data_uri(picture: bytes, kind: str = "png") -> str:
    """A picture that needs no server: it is part of the artifact."""
    return f"data:image/{kind};base64," + base64.b64encode(picture).decode()


def _grids(snapshot: Snapshot) -> set[tuple[int, int]]:
    return {part.grid for part in snapshot.parts}
