"""Memory that a run takes on each rank, before it starts."""

from __future__ import annotations

from collections.abc import Mapping


def memory_per_rank(parameters: int, ranks: int, zero_stage: int, precision: str, offload: str) -> Mapping[str, float]:
    """Bytes of weights, gradients, optimizer (masters and two moments) and average on one rank, activations aside.

    After "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (arXiv 1910.02054), table 1.
    """
    size = 2 if precision == "bfloat16" else 4
    weights = size * parameters / (ranks if zero_stage == 3 else 1)
    gradients = size * parameters / (ranks if zero_stage >= 2 else 1)
    share = parameters / (ranks if zero_stage >= 1 else 1)
    masters = 4 * share if zero_stage >= 1 else 0.0
    optimizer = 0.0 if offload != "none" else masters + 8 * share
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer, "average": 4 * parameters / ranks}
