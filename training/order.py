"""The order in which training sees the samples: a pure function of the counts, a seed and the step.

It knows nothing of ranks, workers or history, so a run resumes at any step on any number of ranks without
losing or repeating a sample; the whole state is the step number. Randomness comes from Philox, a counter-based
generator: each permutation is keyed by (seed, grid, epoch, window) and made when needed.

Within a grid, epoch e is a permutation in two stages, as reading wants it: blocks of neighbouring samples are
shuffled over the whole grid, and the samples of every `window` consecutive blocks among each other. Each epoch
visits each sample exactly once; batches run on over the end of an epoch. Every batch has one grid; over the
steps the grids take turns in proportion to their counts, in shuffled order.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Grid = tuple[int, int]
Ints = NDArray[np.int64]

#: Steps over which the turns of the grids are apportioned and shuffled.
CYCLE = 256
_BLOCKS, _SAMPLES, _TURNS = range(3)


class BatchOrder:
    """Which samples make up the global batch of each step."""

    def __init__(
        self,
        counts: Mapping[Grid, int],
        seed: int,
        global_batch_size: int,
        block: int = 256,
        window: int = 64,
    ) -> None:
        """`counts`: samples of each grid; empty grids are left out.

        `block` samples lie together on disk: larger blocks read faster, a larger `window` (in blocks) shuffles
        better. With a cache smaller than the data set, let a block be about a shard (it has rows of two then) and
        keep the shards of two windows within the cache. Raises ValueError when there is nothing to order.
        """
        self.counts = {grid: count for grid, count in sorted(counts.items()) if count}
        if not self.counts or min(global_batch_size, block, window) < 1:
            raise ValueError(
                f"no order for counts {dict(counts)}, global_batch_size {global_batch_size}, block {block}, "
                f"window {window}: all must be positive"
            )
        self.seed, self.global_batch_size = seed, global_batch_size
        self.block, self.window = block, window
        self._taken = [dict.fromkeys(self.counts, 0)]  # batches of each grid before each cycle
        self._epoch_windows = lru_cache(maxsize=2 * len(self.counts))(self._make_epoch_windows)
        self._window_samples = lru_cache(maxsize=4 * len(self.counts))(self._make_window_samples)

    def batch(self, step: int) -> tuple[Grid, Ints]:
        """The grid of the batch at `step` (from 0) and the ordinals (global_batch_size,) of its samples."""
        grid, turn = self.turn(step)
        first = turn * self.global_batch_size
        return grid, self.positions(grid, first, self.global_batch_size)

    def turn(self, step: int) -> tuple[Grid, int]:
        """The grid of `step`, and how many earlier batches that grid had."""
        cycle, position = divmod(step, CYCLE)
        turns, grids = self._turns(cycle), list(self.counts)
        chosen = turns[position]
        return grids[chosen], self._taken[cycle][grids[chosen]] + int((turns[:position] == chosen).sum())

    def positions(self, grid: Grid, first: int, length: int) -> Ints:
        """Ordinals at positions first ... first + length - 1 of the endless sample stream of `grid`."""
        pieces = []
        while length:
            epoch, index = divmod(first, self.counts[grid])
            starts, _ = self._epoch_windows(grid, epoch)
            number = int(np.searchsorted(starts, index, side="right")) - 1
            samples = self._window_samples(grid, epoch, number)[index - starts[number] :][:length]
            pieces.append(samples)
            first, length = first + len(samples), length - len(samples)
        return np.concatenate(pieces)

    def _make_epoch_windows(self, grid: Grid, epoch: int) -> tuple[Ints, Ints]:
        """Position of the first sample of each window, and the order of the blocks."""
        count = self.counts[grid]
        blocks = -(-count // self.block)
        order = self._random(_BLOCKS, grid, epoch).permutation(blocks)
        lengths = np.full(blocks, self.block)
        lengths[order == blocks - 1] = count - (blocks - 1) * self.block  # the last block may be short
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])[:: self.window]
        return starts, order

    def _make_window_samples(self, grid: Grid, epoch: int, number: int) -> Ints:
        _, order = self._epoch_windows(grid, epoch)
        blocks = order[number * self.window : (number + 1) * self.window]
        samples = (blocks[:, None] * self.block + np.arange(self.block)).ravel()
        samples = samples[samples < self.counts[grid]]
        return self._random(_SAMPLES, grid, epoch, number).permutation(samples)

    def _turns(self, cycle: int) -> Ints:
        """The grids (as positions in `counts`) of the steps of a cycle."""
        while len(self._taken) <= cycle + 1:
            self._taken.append(self._apportion(self._taken[-1], len(self._taken)))
        before, after = self._taken[cycle], self._taken[cycle + 1]
        turns = np.repeat(np.arange(len(before)), [after[grid] - before[grid] for grid in before])
        return self._random(_TURNS, (0, 0), cycle).permutation(turns)

    def _apportion(self, taken: dict[Grid, int], cycles: int) -> dict[Grid, int]:
        """Batches of each grid after `cycles` cycles: as near to its share as whole, growing numbers allow."""
        total = sum(self.counts.values())
        exact = {grid: cycles * CYCLE * count for grid, count in self.counts.items()}  # times total
        after = {grid: max(taken[grid], exact[grid] // total) for grid in taken}
        while (missing := cycles * CYCLE - sum(after.values())) != 0:
            step = 1 if missing > 0 else -1
            movable = [grid for grid in after if step > 0 or after[grid] > taken[grid]]
            after[max(movable, key=lambda grid: step * (exact[grid] - after[grid] * total))] += step
        return after

    def _random(self, purpose: int, grid: Grid, *key: int) -> np.random.Generator:
        entropy = (self.seed, purpose, *grid, *key)
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))
