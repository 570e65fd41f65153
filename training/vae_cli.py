"""`starflow train-vae`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from starflow.config import load_config


def train_vae(
    images: Annotated[Path | None, typer.Option(help="Folder of pictures, searched recursively.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for config.json and the weights.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with any of the settings.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings as key=value.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; all cores if not given.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:
    """Train a small VAE (diffusers' AutoencoderKL) on a folder of pictures; prints its held-out PSNR."""
    from dataclasses import asdict

    import torch

    from starflow.console import console, print_json
    from training.vae import VAEReport, VAETrainConfig, train

    settings = load_config(VAETrainConfig, config, overrides or (), images=images, out=out, steps=steps)
    if threads is not None:
        torch.set_num_threads(threads)

    def on_progress(step: int, loss: float, report: VAEReport | None) -> None:
        if report is not None:
            console.print(f"step {step}/{settings.steps}  loss {loss:.4f}  {_describe(report)}", highlight=False)

    report = train(settings, on_progress)
    if as_json:
        answer: dict[str, Any] = asdict(report) | {"out": str(settings.out)}
        print_json(answer)
    else:
        print(f"{settings.out}: {_describe(report)}, {report.parameters:,} parameters")


def _describe(report: Any) -> str:
    return (
        f"held-out PSNR {report.psnr:.2f} dB, with latent noise 0.2 {report.psnr_noisy:.2f} dB, "
        f"scaling factor {report.scaling_factor:.4f}, {report.seconds:.0f} s"
    )
