"""Moving average of the weights in float32, shared between ranks exactly like the optimizer's masters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from training.engine import Fragment


def decay_at(decay: float, updates: int) -> float:
    """Decay of update number `updates` (from 0): short memory first, so that the initial weights fade."""
    return min(decay, (1 + updates) / (10 + updates))


class EMA:
    """One float32 tensor per fragment of this rank."""

    def __init__(self, fragments: Sequence[Fragment]) -> None:
        self._fragments = list(fragments)
        self._masters = [fragment.master for fragment in fragments]
        self.averages: list[Tensor] = [master.clone() for master in self._masters]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """average <- decay * average + (1 - decay) * master."""
        if self.averages:
            torch._foreach_lerp_(self.averages, self._masters, 1 - decay)

    def whole(
        self, shapes: Mapping[str, tuple[int, ...]], device: torch.device, beat: Callable[[], None]
    ) -> Iterator[tuple[str, Tensor]]:
        """Averaged parameters by name, float32 on `device`, one in memory at a time. All ranks iterate together."""
        mine: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
        for fragment, average in zip(self._fragments, self.averages, strict=True):
            mine[fragment.name].append((fragment.start, average))
        for name, shape in shapes.items():
            parameter = torch.zeros(shape, device=device)
            flat = parameter.view(-1)
            for start, average in mine[name]:
                flat[start : start + len(average)] = average
            dist.all_reduce(parameter)  # each value is one rank's, zero on the others
            beat()
            yield name, parameter
