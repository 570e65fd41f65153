"""`starflow finetune-decoder`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def finetune_decoder(
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings as key=value, over the file's.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with the settings.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; all cores if not given.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the finished decoder as JSON on stdout.")] = False,
) -> None:
    """Teach a VAE's decoder to decode noisy latents, or go on with it; `starflow sample` then uses it."""
    import torch

    from starflow.config import load_config
    from starflow.console import console, print_json
    from training.decoder import DecoderConfig, Losses, finetune

    settings = load_config(DecoderConfig, config, overrides or ())
    if threads is not None:
        torch.set_num_threads(threads)
    if not settings.perceptual_files:
        console.print("no perceptual_files given: fine-tuning without the perceptual loss (LPIPS)", highlight=False)

    def on_progress(step: int, losses: Losses, quality: Any) -> None:
        if quality is not None:
            parts = f"loss {losses.total:.4f}  pixels {losses.reconstruction:.4f}"
            if losses.discriminator is not None:
                parts += f"  discriminator {losses.discriminator:.3f}"
            console.print(f"step {step}/{settings.steps}  {parts}  {_describe(quality)}", highlight=False)

    decoder = finetune(settings, on_progress)
    if as_json:
        print_json(decoder.model_dump(mode="json"))
    else:
        print(f"{settings.store}/{settings.name}: {decoder.steps} steps, {_describe(decoder.quality)}")


def _describe(quality: Any) -> str:
    text = f"held-out PSNR {quality.tuned:.2f} dB (the VAE's own decoder {quality.plain:.2f} dB)"
    if quality.tuned_lpips is not None:
        text += f", LPIPS {quality.tuned_lpips:.4f} ({quality.plain_lpips:.4f})"
    return text
