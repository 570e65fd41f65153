"""What a model costs: parameters, floating-point operations and memory, from its config alone.

A multiply-add counts as two operations. Attention is counted causally (half the square), as it is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from starflow.architecture import FlowConfig

#: Bytes a parameter in bfloat16 training with AdamW: weight, gradient; float32 weight and two moments.
WEIGHT_BYTES, GRADIENT_BYTES, OPTIMIZER_BYTES = 2, 2, 12


@dataclass(frozen=True)
class BlockShape:
    """One block: transformer layers, sequence length with its prefix, prefix tokens."""

    layers: int
    sequence: int
    prefix: int


def blocks(config: FlowConfig) -> list[BlockShape]:
    """The blocks at the nominal grid, data -> noise."""
    height, width = config.tokens(*config.grid)
    prefixes = [0] * (len(config.layers) - 1) + [config.prefix_length]
    return [BlockShape(n, height * width + prefix, prefix) for n, prefix in zip(config.layers, prefixes, strict=True)]


def parameters(config: FlowConfig) -> int:
    """Number of parameters, without building the model."""
    width, token = config.width, config.token_width
    layer = 12 * width**2 + 13 * width  # qkv, out, up, down with biases; two norms
    block = token + (token + 1) * width + width + (width + 1) * 2 * token
    text = (config.text_width + 1) * width if config.text_length else 0
    label = (config.classes + 1) * width if config.classes else 0
    return sum(config.layers) * layer + len(config.layers) * block + text + label


def forward_flops(config: FlowConfig) -> float:
    """Operations of one picture from data to noise."""
    width, token = config.width, config.token_width
    total = 0.0
    for block in blocks(config):
        image = block.sequence - block.prefix
        total += block.layers * (24 * width**2 * block.sequence + 2 * width * block.sequence**2)
        total += image * 6 * token * width  # embedding D -> M, head M -> 2D
        total += 2 * block.prefix * config.text_width * width
    return total


def training_flops(config: FlowConfig, recompute: bool = False) -> float:
    """Operations of one picture's forward and backward pass; `recompute`: full activation checkpointing."""
    return forward_flops(config) * (4 if recompute else 3)


def sampling_flops(config: FlowConfig, guided: bool = True, evaluations: float = 1.0) -> float:
    """Operations of one sampled picture: sequentially each token once, by Jacobi `evaluations` times.

    Guidance doubles the deep block alone; the text prefix runs once.
    """
    width, token = config.width, config.token_width
    total = 0.0
    for block in blocks(config):
        rows = 2 if guided and block.prefix else 1
        image = block.sequence - block.prefix
        attended = 2 * width * (block.sequence**2 - block.prefix**2)
        steps = block.layers * (24 * width**2 * image + attended) + image * 6 * token * width
        prefill = block.layers * (24 * width**2 * block.prefix + 2 * width * block.prefix**2)
        prefill += 2 * block.prefix * config.text_width * width
        total += rows * (steps * evaluations + prefill)
    return total


def training_memory(config: FlowConfig, ranks: int = 8) -> dict[str, float]:
    """Bytes a rank for weights, gradients and optimizer in bfloat16 with AdamW, by ZeRO stage."""
    count = parameters(config)
    whole = {0: (1, 1, 1), 1: (1, 1, ranks), 2: (1, ranks, ranks), 3: (ranks, ranks, ranks)}
    return {
        f"zero{stage}": count * (WEIGHT_BYTES / w + GRADIENT_BYTES / g + OPTIMIZER_BYTES / o)
        for stage, (w, g, o) in whole.items()
    }


def sampling_memory(config: FlowConfig, batch: int, guided: bool = True, value_bytes: int = 2) -> float:
    """Bytes for the weights and the largest block's key/value cache."""
    caches = [
        (2 if guided and block.prefix else 1) * batch * block.layers * block.sequence * 2 * config.width
        for block in blocks(config)
    ]
    return (parameters(config) + max(caches)) * value_bytes


def describe(config: FlowConfig, ranks: int = 8) -> dict[str, Any]:
    """Everything above as JSON types."""
    height, width = config.tokens(*config.grid)
    return {
        "config": config.to_dict(),
        "parameters": parameters(config),
        "image_tokens": height * width,
        "prefix_tokens": config.prefix_length,
        "values_per_image": height * width * config.token_width,
        "flops_per_image": {
            "forward": forward_flops(config),
            "training": training_flops(config),
            "training_full_checkpointing": training_flops(config, recompute=True),
            "sampling": sampling_flops(config, guided=False),
            "sampling_guided": sampling_flops(config),
        },
        "training_bytes_per_rank": {"ranks": ranks, **training_memory(config, ranks)},
        "sampling_bytes": {
            "batch_1_guided_bfloat16": sampling_memory(config, 1),
            "batch_8_guided_bfloat16": sampling_memory(config, 8),
        },
    }
