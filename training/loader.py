"""Batches for one rank, made ready by a thread in the background.

One thread keeps up with any GPU (see benchmarks/loader.py); worker processes would only add copies. What a
batch holds is a pure function of the order and the step, so the loader has no state to save.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from starflow.reader import Batch, Grid
from starflow.shardindex import Ints
from training.order import BatchOrder


class Reader(Protocol):
    """What the loader needs of `starflow.reader.SnapshotReader`."""

    def gather(self, grid: Grid, ordinals: Ints, draws: NDArray[np.float64] | None = None) -> Batch: ...

    def prefetch(self, grid: Grid, ordinals: Ints) -> None: ...


def rank_slice(global_batch_size: int, rank: int, ranks: int) -> slice:
    """The part of a global batch that `rank` of `ranks` trains on.

    Raises ValueError unless all ranks get the same number of samples.
    """
    if global_batch_size % ranks or not 0 <= rank < ranks:
        raise ValueError(f"a global batch of {global_batch_size} cannot be shared by rank {rank} of {ranks} ranks")
    size = global_batch_size // ranks
    return slice(rank * size, (rank + 1) * size)


def caption_draws(seed: int, step: int, global_batch_size: int) -> NDArray[np.float64]:
    """The numbers (G,) in [0, 1) that choose the captions of the global batch at `step`."""
    entropy = np.random.SeedSequence((seed, step, 0xCAB))
    return np.random.Generator(np.random.Philox(entropy)).random(global_batch_size)


def load_batch(reader: Reader, order: BatchOrder, rank: int, ranks: int, step: int) -> Batch:
    """The samples of `rank` at `step`, ascending in ordinals (their order within a batch has no meaning)."""
    mine = rank_slice(order.global_batch_size, rank, ranks)
    grid, ordinals = order.batch(step)
    draws = caption_draws(order.seed, step, order.global_batch_size)[mine]
    ascending = np.argsort(ordinals[mine], kind="stable")
    return reader.gather(grid, ordinals[mine][ascending], draws[ascending])


class Loader:
    """Iterates over (step, batch) from `start` up to `stop`, `ready` batches ahead of the consumer.

    Use it as a context manager, or call `close`. An error while reading is raised where the batch would be.
    """

    def __init__(
        self,
        reader: Reader,
        order: BatchOrder,
        rank: int,
        ranks: int,
        start: int = 0,
        stop: int | None = None,
        ready: int = 4,
        ahead: int = 16,
    ) -> None:
        """`ahead`: downloads of shards start that many steps before they are needed."""
        self._reader, self._order, self._rank, self._ranks = reader, order, rank, ranks
        self._mine = rank_slice(order.global_batch_size, rank, ranks)
        self._start, self._stop, self._ahead = start, stop, ahead
        self._ready: queue.Queue[tuple[int, Batch] | Exception | None] = queue.Queue(maxsize=ready)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        while (item := self._ready.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the thread."""
        self._closed.set()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.05)  # makes room for the item the thread may be waiting to put
            except queue.Empty:
                continue
        self._thread.join()

    def _work(self) -> None:
        try:
            step = self._start
            for soon in range(step, step + self._ahead):
                self._prefetch(soon)
            while step != self._stop and not self._closed.is_set():
                self._prefetch(step + self._ahead)
                batch = load_batch(self._reader, self._order, self._rank, self._ranks, step)
                self._ready.put((step, batch))
                step += 1
            self._ready.put(None)
        except Exception as error:  # noqa: BLE001 - handed to the consumer, who raises it
            self._ready.put(error)

    def _prefetch(self, step: int) -> None:
        if self._stop is None or step < self._stop:
            grid, ordinals = self._order.batch(step)
            self._reader.prefetch(grid, ordinals[self._mine])
