"""Between the released checkpoint layout and ours, bit for bit both ways, one tensor at a time.

Names are mapped by rule. The only values that move are the rows of q and k: the released layout rotates
neighbouring channels (2j, 2j + 1), ours rotates halves (j, j + d/2); see `starflow.model.rotate`.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from starflow.errors import StarflowError
from starflow.model import FlowConfig, STARFlow


class WeightsError(StarflowError):
    """A state dict that does not have exactly the tensors of the architecture."""


#: released name -> our name, after `blocks.{k}.`
_BLOCK = {
    "sos_embed": "start",
    "proj_in.weight": "embed.weight",
    "proj_in.bias": "embed.bias",
    "proj_out.weight": "head.weight",
    "proj_out.bias": "head.bias",
    "final_norm.weight": "head.norm",
    "proj_txt.weight": "text.weight",
    "proj_txt.bias": "text.bias",
}
#: the same after `blocks.{k}.attn_blocks.{j}.`
_LAYER = {
    "attention.norm": "attention.norm",
    "attention.qkv": "attention.qkv",
    "attention.proj": "attention.out",
    "mlp.norm": "mlp.norm",
    "mlp.main.0": "mlp.up",
    "mlp.main.2": "mlp.down",
}
_BUFFER = re.compile(r"blocks\.\d+\.attn_mask|var|feat_rope\.freqs_(cos|sin)")


def released_names(config: FlowConfig) -> dict[str, str]:
    """{released name: our name} for every tensor of the architecture."""
    if config.classes:
        raise WeightsError("the released layout has no label embedding; class-conditional models cannot use it")
    names = {}
    for k, layers in enumerate(config.layers):
        for theirs, ours in _BLOCK.items():
            if ours.startswith("text.") and not (config.text_length and k == len(config.layers) - 1):
                continue
            names[f"blocks.{k}.{theirs}"] = f"blocks.{k}.{ours}"
        for j in range(layers):
            for theirs, ours in _LAYER.items():
                for kind in ("weight", "bias"):
                    names[f"blocks.{k}.attn_blocks.{j}.{theirs}.{kind}"] = f"blocks.{k}.layers.{j}.{ours}.{kind}"
    return names


def _reorder_qk(config: FlowConfig, inverse: bool) -> Callable[[Tensor], Tensor]:
    heads, pairs = config.width // config.head_dim, config.head_dim // 2

    def reorder(qkv: Tensor) -> Tensor:
        qk, v = qkv.split([2 * config.width, config.width])
        shape = (2 * heads, 2, pairs) if inverse else (2 * heads, pairs, 2)
        qk = qk.unflatten(0, shape).transpose(1, 2).flatten(0, 2)
        return torch.cat([qk, v])

    return reorder


def from_released(
    released: Mapping[str, Tensor], config: FlowConfig, source: str = "state dict"
) -> Iterator[tuple[str, Tensor]]:
    """Yields (our name, tensor) one at a time; values are views of `released` except for q, k, v.

    Raises WeightsError naming the first key that is unknown, missing or of another shape.
    """
    names, shapes = released_names(config), our_shapes(config)
    unknown = [key for key in released if key not in names and not _BUFFER.fullmatch(key)]
    missing = [key for key in names if key not in released]
    if unknown or missing:
        what = f"unknown key {unknown[0]}" if unknown else f"missing key {missing[0]}"
        raise WeightsError(
            f"{source}: {what} ({len(unknown)} unknown, {len(missing)} missing); is it for layers {config.layers}?"
        )
    reorder = _reorder_qk(config, inverse=False)
    for theirs, ours in names.items():
        tensor = released[theirs]
        if tensor.shape != shapes[ours]:
            raise WeightsError(
                f"{source}: {theirs} has shape {tuple(tensor.shape)}, the architecture needs {tuple(shapes[ours])}"
            )
        yield ours, reorder(tensor) if ".qkv." in ours else tensor


def to_released(state: Mapping[str, Tensor], config: FlowConfig) -> dict[str, Tensor]:
    """The state dict in the released layout (parameters only): the exact inverse of `from_released`."""
    check_state(state, config, "state dict")
    reorder = _reorder_qk(config, inverse=True)
    return {
        theirs: reorder(state[ours]) if ".qkv." in ours else state[ours]
        for theirs, ours in released_names(config).items()
    }


def our_shapes(config: FlowConfig) -> dict[str, torch.Size]:
    """{our name: shape}, without allocating a parameter."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in STARFlow(config).state_dict().items()}


def check_state(state: Mapping[str, Any], config: FlowConfig, source: str) -> None:
    """Raises WeightsError unless `state` has exactly our names and shapes."""
    shapes = our_shapes(config)
    for name in sorted(shapes.keys() | state.keys()):
        if name not in state:
            raise WeightsError(f"{source}: missing key {name}")
        if name not in shapes:
            raise WeightsError(f"{source}: unknown key {name}")
        if tuple(state[name].shape) != tuple(shapes[name]):
            raise WeightsError(
                f"{source}: {name} has shape {tuple(state[name].shape)}, the config needs {tuple(shapes[name])}"
            )


def read_released(path: Path) -> dict[str, Tensor]:
    """Memory-maps a released `.pth` (never unpickling code) or `.safetensors` state dict."""
    if not path.is_file():
        raise WeightsError(f"weights file {path} does not exist; check the path")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, ValueError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise WeightsError(f"weights file {path} cannot be read as a state dict: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"weights file {path} does not hold a flat state dict of tensors")
    return state


def load_released(path: str | Path, config: FlowConfig) -> STARFlow:
    """A float32 model in eval mode with the weights of a released state dict (`.pth` or `.safetensors`).

    The file is memory-mapped and copied tensor by tensor: the weights are in RAM once.
    Raises WeightsError naming a key that is unknown, missing or of another shape.
    """
    with torch.device("meta"):
        model = STARFlow(config)
    model = model.to(torch.float32).to_empty(device="cpu")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in from_released(read_released(Path(path)), config, str(path)):
            parameters[name].copy_(tensor)
    return model.eval()
