"""Packed layers compute what plain ones do, and leave the model alone."""

from __future__ import annotations

import pytest
import torch

from starflow.model import Layer
from starflow.packed import PackedLinear, pack


@pytest.mark.parametrize("rows", [(1,), (1, 1), (2, 1), (3, 5)])
def test_packed_equals_plain(rows: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(24, 40)
    x = torch.randn(*rows, 24)
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(linear)(x), linear(x), rtol=1e-5, atol=1e-6)
        expected = torch.nn.functional.gelu(linear(x))
        torch.testing.assert_close(PackedLinear(linear, "gelu")(x), expected, rtol=1e-5, atol=1e-6)


def test_the_layer_itself_is_not_changed() -> None:
    layer = Layer(64, 64)
    names = [name for name, _ in layer.named_parameters()]
    packed = pack(layer)
    assert isinstance(packed, Layer)
    assert isinstance(packed.mlp.up, PackedLinear)
    assert isinstance(layer.mlp.up, torch.nn.Linear)
    assert [name for name, _ in layer.named_parameters()] == names


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_stay_as_they_are(dtype: torch.dtype) -> None:
    layer = Layer(64, 64).to(dtype)
    assert pack(layer) is layer
