"""The `starflow` sub-commands about architectures and released weights: model, import, export, verify."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from starflow.console import console, print_json
from starflow.errors import ConfigError

AsJson = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]

model = typer.Typer(help="Describe the model presets.", no_args_is_help=True, add_completion=False)


@model.callback()
def _model_group() -> None:
    """Describe the model presets."""


@model.command("list")
def list_presets(as_json: AsJson = False) -> None:
    """List the presets."""
    from starflow import flops
    from starflow.presets import PRESETS

    sizes = {name: flops.parameters(config) for name, config in PRESETS.items()}
    if as_json:
        print_json(sizes)
    else:
        for name, count in sizes.items():
            print(f"{name:14} {_si(count):>7} parameters")


@model.command("describe")
def describe_preset(
    preset: Annotated[str, typer.Argument(help="Name of a preset; `starflow model list` shows them.")],
    ranks: Annotated[int, typer.Option(min=1, help="Ranks that share a ZeRO-partitioned training.")] = 8,
    as_json: AsJson = False,
) -> None:
    """Print parameters, FLOPs per image for training and sampling, and memory per ZeRO stage."""
    from starflow import flops
    from starflow.presets import get_preset

    described = flops.describe(get_preset(preset), ranks)
    if as_json:
        print_json(described)
        return
    config, costs = described["config"], described["flops_per_image"]
    print(f"{preset}: {_si(described['parameters'])} parameters, width {config['width']}, layers {config['layers']}")
    print(
        f"  one image: {described['image_tokens']} tokens, {described['values_per_image']} values, "
        f"{described['prefix_tokens']} prefix tokens"
    )
    for name, value in costs.items():
        print(f"  {name.replace('_', ' '):28} {_si(value)}FLOP per image")
    for stage in ("zero0", "zero1", "zero2", "zero3"):
        value = described["training_bytes_per_rank"][stage]
        print(f"  {stage} on {ranks} ranks{'':14} {value / 2**30:8.2f} GiB a rank, before activations")
    for name, value in described["sampling_bytes"].items():
        print(f"  sampling {name.replace('_', ' '):28} {value / 2**30:8.2f} GiB")


def import_(
    source: Annotated[Path, typer.Argument(help="Released state dict, .pth or .safetensors.")],
    folder: Annotated[Path, typer.Argument(help="Folder for model.safetensors and config.json.")],
    preset: Annotated[str, typer.Option(help="Architecture of the weights, by preset.")] = "t2i-256",
    config: Annotated[Path | None, typer.Option(help="Architecture file (JSON) instead of a preset.")] = None,
) -> None:
    """Convert Apple's released weights to safetensors, one tensor at a time."""
    from starflow.convert import import_released
    from starflow.model import FlowConfig
    from starflow.presets import get_preset

    if config is None:
        flow = get_preset(preset)
    else:
        try:
            flow = FlowConfig.from_released(json.loads(config.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{config} is not an architecture file: {type(error).__name__}: {error}") from error
    import_released(source, flow, folder)
    console.print(f"wrote {folder}/model.safetensors and config.json")


def export(
    folder: Annotated[Path, typer.Argument(help="Folder with model.safetensors and config.json.")],
    target: Annotated[Path, typer.Argument(help="The .pth file to write.")],
) -> None:
    """Write weights in Apple's released layout, bit for bit."""
    from starflow.convert import export_released

    export_released(folder, target)
    console.print(f"wrote {target}")


def verify(
    prefix: Annotated[str, typer.Argument(help="PREFIX of .json, .checkpoint.pth and .vectors.safetensors.")],
) -> None:
    """Compare this implementation with reference vectors; exit code 0 only when all agree to 1e-4."""
    import torch

    from starflow.verify import LIMIT
    from starflow.verify import verify as compare

    torch.set_num_threads(1)  # reference models are tiny: handing their work to threads takes longer than doing it
    errors = compare(prefix)
    wrong = [name for name, error in errors.items() if not error <= LIMIT]
    finite = {name: error if error != float("inf") else "infinite" for name, error in errors.items()}
    print_json({"limit": LIMIT, "passed": not wrong, "errors": finite})
    if wrong:
        console.print(f"beyond {LIMIT}: {', '.join(wrong)}")
        raise typer.Exit(1)


def _si(value: float) -> str:
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.2f} {unit}"
    return f"{value:.0f} "
