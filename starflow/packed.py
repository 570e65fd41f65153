"""Linear layers packed for sampling on a CPU.

PyTorch multiplies float32 matrices with MKL, which is slow for the few rows that a decoder evaluates at a time on
processors that are not Intel's. oneDNN, which PyTorch carries as well, keeps the weight in a layout of its own and
takes half the time or less from two rows on (benchmarks/sampling.py).
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starflow.model import Layer

M = TypeVar("M", bound=nn.Module)


class PackedLinear(nn.Module):
    """The same map as `linear`, (..., in) -> (..., out) float32; it keeps a copy of the weight as it is now."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight.detach(), linear.bias.detach()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, None)

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == x.shape[-1]:  # a single row is bound by memory, where the plain layout wins
            return F.linear(x, self.weight, self.bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y


def pack(layer: nn.Module) -> Layer:
    """`layer` for inference with packed weights; the layer itself on a GPU and in other types than float32."""
    assert isinstance(layer, Layer)
    weight = layer.mlp.up.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return layer
    packed = _shallow_copy(layer)
    packed.attention, packed.mlp = _shallow_copy(layer.attention), _shallow_copy(layer.mlp)
    for module, names in ((packed.attention, ("qkv", "out")), (packed.mlp, ("up", "down"))):
        for name in names:
            setattr(module, name, PackedLinear(getattr(module, name)))
    return packed


def _shallow_copy(module: M) -> M:
    """A module that shares everything with `module` but the table of its children."""
    other = copy.copy(module)
    other._modules = dict(module._modules)
    return other
