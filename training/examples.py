"""What the model sees: latents drawn from the posterior, noise, captions or the null caption.

Every random draw for sample i at step s comes from a counter-based generator (Philox) keyed by (seed, s, i), so
it does not depend on the number of ranks, on workers or on what was drawn before.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from starflow.reader import Batch
from training.conditions import Conditioner
from training.config import TrainConfig

#: The step of held-out draws; no training step has such a number.
HELD_OUT_STEP = 2**62


@dataclass(frozen=True)
class Examples:
    """One rank's share of a step.

    latents: (B, C, h, w) float32, noise included. condition: (B, L, E) float32 text states, (B,) int64 labels,
    or None. text_seconds: time the text encoder took.
    """

    latents: Tensor
    condition: Tensor | None
    text_seconds: float
    find_ids: Callable[[], list[str]]


class ExampleMaker:
    """Turns samples of a snapshot into examples."""

    def __init__(self, config: TrainConfig, conditioner: Conditioner) -> None:
        self._config, self._conditioner = config, conditioner

    def training(self, step: int, batch: Batch) -> Examples:
        """What a rank trains on at `step` (from 0)."""
        return self._examples(step, batch, self._config.caption_dropout)

    def held_out(self, batch: Batch) -> Examples:
        """Held-out samples, no caption dropped; the draws are the same at every validation."""
        return self._examples(HELD_OUT_STEP, batch, 0.0)

    def _examples(self, step: int, batch: Batch, dropout: float) -> Examples:
        key = np.array([self._config.seed, step], np.uint64)
        latents = batch.mean.astype(np.float32)
        dropped = np.zeros(len(latents), bool)
        for row, ordinal in enumerate(batch.ordinals.tolist()):
            generator = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, ordinal, 0]))
            dropped[row] = generator.random() < dropout
            if self._config.resample:
                latents[row] += batch.std[row] * generator.standard_normal(latents[row].shape, np.float32)
            if self._config.latent_noise:
                noise = generator.standard_normal(latents[row].shape, np.float32)
                latents[row] += self._config.latent_noise * noise
        condition, seconds = self._conditioner(batch.captions, batch.text, dropped)
        return Examples(torch.from_numpy(latents), condition, seconds, batch.find_ids)


def prefetch(source: Iterable[Examples], depth: int = 2) -> Iterator[Examples]:
    """The items of `source`, made ahead by one thread that ends with the iterator.

    An error in `source` is raised here, at its place.
    """
    ready: queue.Queue[Examples | BaseException | None] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: Examples | BaseException | None) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in source:
                put(item)
                if stop.is_set():
                    return
            put(None)
        except BaseException as error:  # noqa: BLE001 - handed over to the thread that trains
            put(error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
