"""A look into a snapshot: random samples decoded back to pictures, with their captions."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from starflow.encoders import load_vae, to_pixels
from starflow.errors import StoreError
from starflow.images import picture_grid
from starflow.objectstore import ObjectStore
from starflow.reader import Grid, SnapshotReader
from starflow.snapshots import Snapshot

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Snapshot {id}</title>
<style>
 body {{ font: 14px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; color: #222; }}
 .grid {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); gap: 1rem; }}
 figure {{ margin: 0; }} img {{ width: 100%; image-rendering: pixelated; border-radius: 4px; }}
 figcaption {{ overflow-wrap: anywhere; }} small {{ color: #666; }}
</style>
<h1>Snapshot {id}</h1>
<p>{total:,} samples, {parts} parts, VAE {vae}, published {created}. {attribution}</p>
<div class="grid">
{figures}
</div></html>
"""


@dataclass(frozen=True)
class Preview:
    """Decoded samples of one grid and what is known of them."""

    grid: Grid
    pixels: np.ndarray  # (n, H, W, 3) uint8
    captions: list[list[str]]
    urls: list[str]

    @property
    def name(self) -> str:
        """The grid, as height x width of its latents."""
        return f"{self.grid[0]}x{self.grid[1]}"

    def picture(self) -> Image.Image:
        """All samples in one picture, each above its first caption."""
        captions = [each[0] if each else "" for each in self.captions]
        return picture_grid(list(self.pixels), captions, scale=max(1, 96 // self.pixels.shape[1]))


def decode_samples(
    store: ObjectStore, snapshot: Snapshot, cache: Path, count: int, seed: int = 0, vae: str | None = None
) -> list[Preview]:
    """`count` random samples, every shape getting its share. `vae` says where to find the VAE (default: its name).

    Raises StoreError when that VAE is not the one that made the snapshot.
    """
    import torch

    reader = SnapshotReader(store, snapshot, cache)
    random = np.random.default_rng(seed)
    total = sum(reader.counts.values())
    chosen = np.sort(random.choice(total, min(count, total), replace=False))
    decoder = load_vae(vae or snapshot.vae.name)
    if decoder.identity.sha256 != snapshot.vae.sha256:
        raise StoreError(
            f"snapshot {snapshot.id} was made by the VAE {snapshot.vae.name} ({snapshot.vae.sha256[:12]}), "
            f"{vae or snapshot.vae.name} has other weights ({decoder.identity.sha256[:12]}); "
            "name the right one with --vae"
        )
    previews, first = [], 0
    for grid, length in reader.counts.items():
        ordinals = chosen[(chosen >= first) & (chosen < first + length)] - first
        first += length
        if len(ordinals):
            batch = reader.gather(grid, ordinals)
            pixels = to_pixels(decoder.decode(torch.from_numpy(batch.mean).float()))
            urls = reader.samples(grid, ordinals)["url"].to_pylist()
            previews.append(Preview(grid, pixels, reader.captions(grid, ordinals), [url or "" for url in urls]))
    return previews


def write_preview(snapshot: Snapshot, previews: list[Preview], folder: Path) -> Path:
    """Writes ``index.html`` and one ``grid-<height>x<width>.png`` a shape into `folder`; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = []
    for preview in previews:
        name = preview.name
        preview.picture().save(folder / f"grid-{name}.png")
        for number, pixels in enumerate(preview.pixels):
            file = f"{name}-{number:04d}.png"
            Image.fromarray(pixels).save(folder / file)
            captions = "<br>".join(escape(caption) for caption in preview.captions[number])
            source = escape(preview.urls[number])
            caption = f"<figcaption>{captions}<br><small>{source}</small></figcaption>"
            figures.append(f'<figure><img src="{file}" alt="">{caption}</figure>')
    page = folder / "index.html"
    page.write_text(
        _PAGE.format(
            id=snapshot.id,
            total=snapshot.counts.total,
            parts=len(snapshot.parts),
            vae=escape(snapshot.vae.name),
            created=snapshot.created,
            attribution=escape(snapshot.attribution or ""),
            figures="\n".join(figures),
        ),
        encoding="utf-8",
    )
    return page
