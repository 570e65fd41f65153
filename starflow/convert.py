"""Between the released checkpoint layout and ours, bit for bit both ways, one tensor at a time.

Names are mapped by rule. The only values that move are the rows of q and k: the released layout rotates
neighbouring channels (2j, 2j + 1), ours rotates halves (j, j + d/2); see `starflow.model.rotate`.
"""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, RuntimeError, ValueError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise WeightsError(
            f"weights file {path} is not what torch.save or safetensors writes, or is cut short; give the released "
            ".pth, or a .safetensors file"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"weights file {path} does not hold a flat state dict of tensors")
    return state


def load_released(path: str | Path, config: FlowConfig) -> STARFlow:
    """A float32 model in eval mode with the weights of a released state dict (`.pth` or `.safetensors`).

    The file is memory-mapped and copied tensor by tensor: the weights are in RAM once.
    Raises WeightsError naming a key that is unknown, missing or of another shape.
    """
    return build(config, from_released(read_released(Path(path)), config, str(path)))


def build(
    config: FlowConfig,
    tensors: Iterable[tuple[str, Tensor]],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> STARFlow:
    """A model in eval mode filled from (name, tensor) pairs; nothing is allocated twice or initialised in vain.

    Raises WeightsError for a name or shape that does not fit, or a parameter left unfilled.
    """
    with torch.device("meta"):
        model = STARFlow(config)
    model = model.to(dtype).to_empty(device=device)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors:
            if name not in parameters:
                raise WeightsError(f"unknown parameter {name}; is the config the one of these weights?")
            parameter = parameters.pop(name)
            if parameter.shape != tensor.shape:
                raise WeightsError(f"{name} has shape {tuple(tensor.shape)}, the config needs {tuple(parameter.shape)}")
            parameter.copy_(tensor)
    if parameters:
        raise WeightsError(f"missing parameter {next(iter(parameters))} ({len(parameters)} missing)")
    return model.eval()


def import_released(source: Path, config: FlowConfig, folder: Path) -> Path:
    """Writes `model.safetensors` (same dtype, same bits) and `config.json` to `folder`, one tensor at a time."""
    released = read_released(source)
    tensors = from_released(released, config, str(source))
    ours = {name: released[theirs] for theirs, name in released_names(config).items() if theirs in released}
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", {name: (t.dtype, t.shape) for name, t in ours.items()}, tensors)
    text = json.dumps({"model": config.to_dict()}, indent=1) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    return folder


def export_released(folder: Path, target: Path) -> None:
    """Writes the weights of an imported or exported model folder in the released layout, as `.pth`."""
    config, tensors = read_model(folder)
    partial = target.with_name(f"{target.name}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    torch.save(to_released(dict(tensors), config), partial)
    partial.replace(target)


def read_model(folder: Path) -> tuple[FlowConfig, Iterator[tuple[str, Tensor]]]:
    """Config and lazily memory-mapped weights of a folder with `config.json` and `model.safetensors`."""
    from safetensors import SafetensorError, safe_open

    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = FlowConfig(**described["model"])
        file = safe_open(folder / "model.safetensors", framework="pt")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise WeightsError(
            f"{folder} is not a model folder (config.json, model.safetensors): {type(error).__name__}: {error}"
        ) from error
    return config, ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118 - not a mapping


_SAFETENSORS_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


def write_safetensors(
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, torch.Size]],
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    """Writes a safetensors file tensor by tensor, in the order of `layout`; the file appears when complete.

    `safetensors.torch.save_file` needs all tensors in RAM at once: 15 GB for the released model.
    """
    header, offset = {}, 0
    for name, (dtype, shape) in layout.items():
        if dtype not in _SAFETENSORS_TYPES:
            raise WeightsError(f"{name} has type {dtype}; weights must be floating point")
        size = math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _SAFETENSORS_TYPES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (expected, _), (name, tensor) in zip(layout.items(), tensors, strict=True):
            assert name == expected, (name, expected)
            tensor.contiguous().flatten().view(torch.uint8).numpy().tofile(file)
    partial.replace(path)
