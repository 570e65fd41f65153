"""Pictures with their latents, for fine-tuning a decoder: a folder, or a snapshot whose original bytes are stored."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from starflow.cache import FileCache
from starflow.encoders import VAE
from starflow.errors import ConfigError, StarflowError
from starflow.images import ImageError, decode_image, fit
from starflow.objectstore import ObjectStore
from starflow.originals import Originals
from starflow.reader import Grid, SnapshotReader
from starflow.snapshots import Snapshot
from training.order import BatchOrder
from training.vae import load_folder, unit

#: Pictures fetched at a time: each is one range of an object.
FETCHES = 16


@dataclass(frozen=True)
class PictureBatch:
    """Posterior mean and std (B, C, h, w) float32, scaled; pictures (B, 3, H, W) uint8; B captions, "" where none."""

    mean: Tensor
    std: Tensor
    pixels: Tensor
    captions: list[str]


class Pictures(Protocol):
    """Where a fine-tuning's pictures come from."""

    #: Says which pictures these are, and nothing of where they lie: a resumed fine-tuning wants the same.
    identity: str
    attribution: str | None
    #: Shortest side of any picture, in pixels.
    smallest: int

    def training(self, step: int) -> PictureBatch:
        """The batch of `step` (from 0): a function of nothing else."""

    def held_out(self, count: int) -> list[PictureBatch]:
        """At most `count` pictures that training never shows, in batches of one shape."""


class FolderPictures:
    """A folder of pictures, all in memory at one size; encoded once at the start."""

    attribution: str | None = None

    def __init__(
        self, folder: Path, resolution: int, held_out: float, vae: VAE, device: str, batch_size: int, seed: int
    ) -> None:
        """See `training.vae.load_folder` for the split. Raises ConfigError for a size that the VAE cannot encode."""
        if resolution % vae.downsampling:
            raise ConfigError(f"resolution {resolution} is not divisible by the VAE's downsampling {vae.downsampling}")
        pixels = load_folder(folder, resolution, held_out, seed)
        digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in pixels)).hexdigest()
        self.identity = f"{len(pixels[0])} + {len(pixels[1])} pictures {digest[:16]}"
        self.smallest = resolution
        self._training, self._held_out = (encode_pictures(vae, part, device) for part in pixels)
        side = resolution // vae.downsampling
        self._order = BatchOrder({(side, side): len(pixels[0])}, seed, batch_size)

    def training(self, step: int) -> PictureBatch:
        _, ordinals = self._order.batch(step)
        return _rows(self._training, ordinals)

    def held_out(self, count: int) -> list[PictureBatch]:
        return [_rows(self._held_out, np.arange(min(count, len(self._held_out.pixels))))]


class SnapshotPictures:
    """A snapshot's stored latents, and its pictures made anew from their original bytes, cut as encoding cut them."""

    def __init__(
        self, store: ObjectStore, snapshot: Snapshot, cache: FileCache, held_out: float, batch_size: int, seed: int
    ) -> None:
        """Raises StarflowError when the store holds the original bytes of none of the samples."""
        self.identity, self.attribution = f"snapshot {snapshot.id}", snapshot.attribution
        self._reader = SnapshotReader(store, snapshot, cache, held_out)
        self._downsampling = snapshot.vae.downsampling
        self.smallest = self._downsampling * min(min(grid) for grid in self._reader.grids)
        self._originals = Originals(store)
        self._pool = ThreadPoolExecutor(FETCHES, thread_name_prefix="pictures")
        self._batch_size = batch_size
        self._sides = {"training": self._present(self._reader), "held out": self._present(self._reader.held_out_side())}
        for side, present in self._sides.items():
            if not any(len(ordinals) for ordinals, _ in present.values()):
                raise StarflowError(
                    f"{store.url} holds the original bytes of no {side} picture of snapshot {snapshot.id}; decoders "
                    "learn from pictures: set images to a folder of them, and vae to the snapshot's VAE"
                )
        counts = {grid: len(ordinals) for grid, (ordinals, _) in self._sides["training"].items()}
        self._order = BatchOrder(counts, seed, batch_size)

    def training(self, step: int) -> PictureBatch:
        grid, positions = self._order.batch(step)
        return self._load(self._reader, grid, "training", positions)

    def held_out(self, count: int) -> list[PictureBatch]:
        batches, reader = [], self._reader.held_out_side()
        shares = {grid: len(ordinals) for grid, (ordinals, _) in self._sides["held out"].items()}
        for grid, length in shares.items():
            wanted = np.arange(min(length, -(-count * length // sum(shares.values()))))
            spans = [wanted[first : first + self._batch_size] for first in range(0, len(wanted), self._batch_size)]
            batches += [self._load(reader, grid, "held out", span) for span in spans]
        return batches

    def _present(self, reader: SnapshotReader) -> dict[Grid, tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """For each grid the ordinals whose original bytes are there, and their numbers in `Originals`."""
        present = {}
        for grid, count in reader.counts.items():
            numbers = self._originals.find(reader.ids(grid, np.arange(count)))
            ordinals = np.flatnonzero(numbers >= 0)
            present[grid] = (ordinals, numbers[ordinals])
        return present

    def _load(self, reader: SnapshotReader, grid: Grid, side: str, positions: NDArray[np.int64]) -> PictureBatch:
        ordinals, numbers = (values[positions] for values in self._sides[side][grid])
        size = (grid[0] * self._downsampling, grid[1] * self._downsampling)
        pixels = self._pool.map(lambda number: self._pixels(int(number), *size), numbers)
        batch = reader.gather(grid, ordinals)
        mean, std = (torch.from_numpy(values.astype(np.float32)) for values in (batch.mean, batch.std))
        return PictureBatch(mean, std, _to_pixels(list(pixels)), batch.captions)

    def _pixels(self, number: int, height: int, width: int) -> np.ndarray:
        try:
            return fit(decode_image(self._originals.read(number)), height, width)
        except ImageError as error:
            raise StarflowError(
                f"an original picture of {self.identity} can no longer be decoded ({error}); was it taken down? "
                "Use the newest snapshot"
            ) from error


def encode_pictures(vae: VAE, pixels: Tensor, device: str, batch: int = 64) -> PictureBatch:
    """Pictures (N, 3, H, W) uint8 with their latents, on the CPU."""
    encoded = [vae.encode(unit(part).to(device)) for part in pixels.split(batch)]
    mean, std = (torch.cat([part.cpu() for part in parts]) for parts in zip(*encoded, strict=True))
    return PictureBatch(mean, std, pixels, [""] * len(pixels))


def _rows(batch: PictureBatch, rows: NDArray[np.int64]) -> PictureBatch:
    chosen = torch.from_numpy(rows)
    captions = [batch.captions[row] for row in rows]
    return PictureBatch(batch.mean[chosen], batch.std[chosen], batch.pixels[chosen], captions)


def _to_pixels(pictures: Sequence[np.ndarray]) -> Tensor:
    """B arrays (H, W, 3) to (B, 3, H, W) uint8."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
