"""What a run will cost, before it starts: parameters, FLOPs, memory."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from starflow.model import FlowConfig, STARFlow


def training_flops(flow: FlowConfig) -> float:
    """Floating-point operations to train on one sample: matrix products of forward and backward pass.

    A product of (a, b) by (b, c) counts 2 a b c; the causal half of attention counts; the backward pass costs
    twice the forward pass. Recomputed activations do not count, as in model FLOPs utilisation (arXiv 2204.02311).
    """
    tokens = math.prod(flow.tokens(*flow.grid))
    width, total = flow.width, 0.0
    for block, layers in enumerate(flow.layers):
        prefix = flow.prefix_length if block == len(flow.layers) - 1 else 0
        length = tokens + prefix
        total += layers * (24 * length * width**2 + 2 * length**2 * width)
        total += 2 * tokens * width * 3 * flow.token_width + 2 * prefix * flow.text_width * width
    return 3 * total


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


def count_parameters(flow: FlowConfig) -> int:
    """Parameters of the architecture, without allocating them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in STARFlow(flow).parameters())
