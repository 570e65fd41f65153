"""Pictures while a run trains: the same held-out captions every time, drawn with the averaged weights."""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from starflow.convert import build
from starflow.encoders import VAE, VAEIdentity, load_vae, to_pixels
from starflow.errors import ConfigError, StarflowError
from starflow.images import picture_grid
from starflow.objectstore import ObjectStore
from starflow.reader import SnapshotReader
from starflow.sampling import denoise, draw_noise, sample
from training.conditions import Conditioner
from training.config import TrainConfig
from training.ema import EMA
from training.engine import Engine
from training.record import list_samples, samples_key

log = logging.getLogger(__name__)

#: Guidance of the pictures, and the width to which small ones are enlarged, so that their captions can be read.
GUIDANCE, SHOWN_WIDTH = 2.0, 96


def earlier_samples(store: ObjectStore, run: str, step: int) -> Iterator[tuple[int, Image.Image]]:
    """Step and grid of everything drawn up to `step`, oldest first."""
    for key in list_samples(store, run):
        drawn = int(key.rpartition("/")[2].removesuffix(".png"))
        if drawn <= step:
            yield drawn, Image.open(io.BytesIO(store.read(key)))


def vae_for_samples(identity: VAEIdentity, device: str) -> VAE:
    """The VAE of the snapshot's latents. Raises EncoderError, or ConfigError when its weights are others."""
    vae = load_vae(identity.name, device)
    if vae.identity.sha256 != identity.sha256:
        raise ConfigError(
            f"the snapshot's latents are from VAE {identity.name} with weights {identity.sha256[:12]}, "
            f"{identity.name} here has {vae.identity.sha256[:12]}; use the snapshot's version, or sample_every=null"
        )
    return vae


class SampleGrids:
    """Every rank has one, and all call `draw` at the same steps; rank 0 decodes and stores the picture.

    Each rank draws its share of the pictures from a copy of the whole averaged model, which lives as long as
    that takes. So no rank waits idly, and ZeRO-3's shared weights are not touched.
    """

    def __init__(
        self,
        config: TrainConfig,
        store: ObjectStore,
        engine: Engine,
        ema: EMA,
        reader: SnapshotReader,
        conditioner: Conditioner,
    ) -> None:
        self._config, self._store, self._engine, self._ema = config, store, engine, ema
        self._identity = reader.snapshot.vae
        self._vae: VAE | None = None
        held_out = reader.held_out_side()
        self._grid, count = max(held_out.counts.items(), key=lambda item: item[1])
        wanted = min(count, config.sample_count)
        self._captions: list[str] = []
        self._condition: Tensor | None = None
        self._null: Tensor | None = None
        if wanted:
            batch = held_out.gather(self._grid, np.linspace(0, count - 1, wanted).astype(np.int64))
            self._captions = batch.captions
            self._condition, _ = conditioner(batch.captions, batch.text, np.zeros(wanted, bool))
            first = None if batch.text is None else batch.text[:1]
            self._null, _ = conditioner(batch.captions[:1], first, np.ones(1, bool))
        self._storing: threading.Thread | None = None

    def draw(self, step: int, beat: Callable[[], None]) -> Image.Image | None:
        """One grid, on rank 0, where it is stored behind the training; None elsewhere or without held-out captions.

        Nor is there one without the VAE: training can do without pictures, so that only logs a warning.
        """
        if not self._captions:
            return None
        latents: list[Tensor | None] = [None] * dist.get_world_size()
        dist.all_gather_object(latents, self._latents(beat))
        if dist.get_rank():
            return None
        try:
            # Loaded at the first grid: starting has no time for it.
            self._vae = self._vae or vae_for_samples(self._identity, str(self._engine.device))
        except StarflowError as error:
            log.warning("no pictures of step %d: %s", step, error)
            return None
        whole = torch.cat([part for part in latents if part is not None])
        if not whole.isfinite().all():
            log.warning("no pictures of step %d: the flow draws latents that are not finite", step)
            return None
        pixels = to_pixels(self._vae.decode(whole.to(self._engine.device)))
        scale = max(1, SHOWN_WIDTH // pixels.shape[2])
        picture = picture_grid(list(pixels), self._captions, min(8, len(pixels)), scale)
        self.close()
        self._storing = threading.Thread(target=self._write, args=(step, picture), name="samples", daemon=True)
        self._storing.start()
        return picture

    def close(self) -> None:
        """Waits for the last picture to be stored."""
        if self._storing is not None:
            self._storing.join()

    def _latents(self, beat: Callable[[], None]) -> Tensor:
        """(b, C, h, w) float32 on the CPU: this rank's share, pictures that depend on their number alone."""
        config, device = self._config, self._engine.device
        half = device.type == "cuda" and config.precision != "float32"
        model = build(
            self._engine.flow.config,
            self._ema.whole(self._engine.shapes, device, beat),
            str(device),
            torch.bfloat16 if half else torch.float32,
        )
        rank, ranks, count = dist.get_rank(), dist.get_world_size(), len(self._captions)
        mine = range(count * rank // ranks, count * (rank + 1) // ranks)
        shape = (model.config.channels, *self._grid)
        if not mine:
            return torch.empty(0, *shape)
        noise = torch.stack([draw_noise(config.seed, number, shape) for number in mine]).to(device)
        condition = None if self._condition is None else self._condition[mine.start : mine.stop].to(device)
        null = None if self._null is None else self._null.to(device)
        guidance = GUIDANCE if model.config.prefix_length else 0.0
        x = sample(model, noise, condition, null, guidance, "jacobi", progress=lambda tokens: beat())
        return (denoise(model, x, condition, config.latent_noise) if config.latent_noise else x).cpu()

    def _write(self, step: int, picture: Image.Image) -> None:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        try:
            self._store.write(samples_key(self._config.run, step), buffer.getvalue())
        except StarflowError as error:
            log.warning("the pictures of step %d could not be stored: %s", step, error)
