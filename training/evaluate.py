"""Held-out likelihood of the model under training, shared between the ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from starflow.reader import SnapshotReader
from training.config import TrainConfig
from training.engine import Engine
from training.examples import ExampleMaker

Grid = tuple[int, int]


def chosen(counts: dict[Grid, int], limit: int) -> Iterator[tuple[Grid, NDArray[np.int64]]]:
    """At most about `limit` held-out samples, evenly spread, each grid by its share; always the same."""
    total = sum(counts.values())
    for grid, count in sorted(counts.items()):
        wanted = min(count, max(1, round(limit * count / total))) if count else 0
        if wanted:
            yield grid, np.linspace(0, count - 1, wanted).astype(np.int64)


def held_out_bits(
    engine: Engine, maker: ExampleMaker, reader: SnapshotReader, config: TrainConfig, beat: Callable[[], None]
) -> float | None:
    """Mean bits per dimension of the (noisy) held-out latents given their captions; None without any.

    Called by all ranks; every rank makes the same number of forward passes, as ZeRO-3 needs.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    sums = torch.zeros(2, dtype=torch.float64)
    for grid, ordinals in chosen(reader.counts, config.validation_samples):
        size = min(config.micro, -(-len(ordinals) // ranks))
        for first in range(0, len(ordinals), size * ranks):
            mine = ordinals[first + rank * size : first + (rank + 1) * size]
            count = len(mine)
            # A rank with none left goes through the motions with a sample that does not count.
            examples = maker.held_out(reader.gather(grid, mine if count else ordinals[:1]))
            condition = examples.condition
            nll = engine.evaluate(
                examples.latents.to(engine.device), None if condition is None else condition.to(engine.device)
            )
            if count:
                sums += torch.tensor([float(nll.double().sum()), count], dtype=torch.float64)
            beat()
    sums = sums.to(engine.device)
    dist.all_reduce(sums)
    total, count = sums.tolist()
    return total / count / math.log(2) if count else None
