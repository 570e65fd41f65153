"""Transformer layers packed for sampling on a CPU.

PyTorch multiplies float32 matrices with MKL, which is slow for the few rows that a decoder evaluates at a time on
processors that are not Intel's. oneDNN, which PyTorch carries as well, keeps the weight in a layout of its own,
takes half the time or less from two rows on, and applies the activation on the way (benchmarks/sampling.py).
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starflow.model import MLP, Layer


class PackedLinear(nn.Module):
    """(..., in) -> (..., out) float32: `linear`, as its weight is now, and an exact GELU if asked for."""

    def __init__(self, linear: nn.Linear, activation: Literal["none", "gelu"] = "none") -> None:
        super().__init__()
        self.weight, self.bias, self.activation = linear.weight.detach(), linear.bias.detach(), activation
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, None)

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == x.shape[-1]:  # a single row is bound by memory, where the plain layout wins
            y = F.linear(x, self.weight, self.bias)
            return F.gelu(y) if self.activation == "gelu" else y
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, self.activation, [], "none")


class PackedMLP(nn.Module):
    """`mlp` with packed weights."""

    def __init__(self, mlp: MLP) -> None:
        super().__init__()
        self.norm, self.up, self.down = mlp.norm, PackedLinear(mlp.up, "gelu"), PackedLinear(mlp.down)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(self.norm(x)))
        return y


def pack(layer: nn.Module) -> nn.Module:
    """`layer` for inference with packed weights; the layer itself on a GPU and in other types than float32."""
    assert isinstance(layer, Layer)
    weight = layer.mlp.up.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return layer
    attention = copy.copy(layer.attention)
    attention._modules = layer.attention._modules | {
        name: PackedLinear(getattr(layer.attention, name)) for name in ("qkv", "out")
    }
    packed = copy.copy(layer)
    packed._modules = {"attention": attention, "mlp": PackedMLP(layer.mlp)}
    return packed
