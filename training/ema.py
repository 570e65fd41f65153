"""Moving average of the weights in float32, shared between ranks exactly like the optimizer's masters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from training.engine import Fragment


def decay_at(decay: float, updates: int) -> float:
    """Decay of update number `updates` (from 0): short memory first, so that the initial weights fade."""
    return min(decay, (1 + updates) / (10 + updates))


class EMA:
    """One float32 tensor per fragment of this rank."""

    def __init__(self, fragments: Sequence[Fragment]) -> None:
        self._masters = [fragment.master for fragment in fragments]
        self.averages: list[Tensor] = [master.clone() for master in self._masters]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """average <- decay * average + (1 - decay) * master."""
        if self.averages:
            torch._foreach_lerp_(self.averages, self._masters, 1 - decay)
