"""Which flow learns the emoji best in the demo's few minutes: the trials behind docs/emoji-preset.md.

One trial trains one architecture for a budget of CPU seconds (not wall-clock: a busy machine changes nothing) and
prints a JSON line: held-out nats per dimension with the right and with shuffled captions, how often the right
caption wins, steps, seconds; and writes a grid of samples. Pictures that differ from a training picture only in skin
tone are not held out, so the figures are harder than the demo's own.

    python benchmarks/emoji_preset.py --width 192 --layers 2 2 6 --learning-rate 1e-3 --batch 64
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from infra.demo.emoji import emoji, render
from starflow.encoders import VAE, TextEncoder, load_text_encoder, load_vae, to_pixels, to_tensor
from starflow.images import decode_image, fit, picture_grid
from starflow.model import FlowConfig, STARFlow
from starflow.sampling import denoise, sample

RESOLUTION, TEXT_LENGTH = 32, 16
PROMPTS = (
    "a red heart",
    "grinning face",
    "red apple",
    "green apple",
    "flag of France",
    "flag of Japan",
    "yellow circle",
    "blue square",
    "cat face",
    "evergreen tree",
    "sun",
    "pizza",
    "waving hand, dark skin tone",
    "man with red hair, light skin tone",
    "automobile",
    "blue book",
)


class Data(NamedTuple):
    """Latents and text states, row by row; `held_out` marks the rows that are never trained on."""

    mean: Tensor
    std: Tensor
    text: Tensor
    held_out: Tensor


def load_data(cache: Path, vae: VAE, text_encoder: TextEncoder) -> Data:
    """Encodes every emoji, or reads what an earlier call encoded with the same weights."""
    file = cache / f"emoji-{vae.identity.sha256[:12]}-{text_encoder.identity.sha256[:12]}.pt"
    if file.exists():
        return Data(*torch.load(file, weights_only=True))
    items = emoji()
    pixels = np.stack([fit(decode_image(render(item.code)), RESOLUTION, RESOLUTION) for item in items])
    encoded = [vae.encode(part) for part in to_tensor(pixels).split(256)]
    mean, std = (torch.cat(parts) for parts in zip(*encoded, strict=True))
    text = text_encoder.encode([item.caption for item in items])
    digests = [hashlib.sha256(item.base.encode()).digest()[0] for item in items]
    data = Data(mean, std, text, torch.tensor(digests) < 10)  # about 4 %, whole families of variants
    cache.mkdir(parents=True, exist_ok=True)
    torch.save(tuple(data), file)
    return data


def train(flow: STARFlow, data: Data, null: Tensor, options: argparse.Namespace) -> tuple[STARFlow, list[dict]]:
    """Trains for `options.seconds` of CPU time; returns the averaged weights and the measurements."""
    average = STARFlow(flow.config).requires_grad_(False)
    average.load_state_dict(flow.state_dict())
    optimizer = torch.optim.AdamW(flow.parameters(), betas=(0.9, 0.95), weight_decay=1e-4)
    generator = torch.Generator().manual_seed(options.seed)
    rows = (~data.held_out).nonzero().squeeze(1)
    measurements, step, start = [], 0, time.process_time()
    marks = [options.seconds * share for share in (0.25, 0.5, 0.75)]
    while (elapsed := time.process_time() - start) < options.seconds:
        rate = 0.5 * (1 + math.cos(math.pi * elapsed / options.seconds)) * min(1, (step + 1) / 20)
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * rate
        pick = rows[torch.randint(len(rows), (options.batch,), generator=generator)]
        x = data.mean[pick] + data.std[pick] * torch.randn(data.mean[pick].shape, generator=generator)
        x = x + options.noise * torch.randn(x.shape, generator=generator)
        dropped = torch.rand(len(pick), 1, 1, generator=generator) < 0.1
        with torch.autocast("cpu", torch.bfloat16, enabled=options.autocast):
            loss = flow(x, torch.where(dropped, null, data.text[pick])).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()
        step += 1
        decay = min(0.98, (1 + step) / (10 + step))
        for mean, value in zip(average.parameters(), flow.parameters(), strict=True):
            mean.lerp_(value.detach(), 1 - decay)
        if marks and elapsed > marks[0]:
            marks.pop(0)
            measurements.append({"step": step, **measure(average, data, options.noise)})
    return average, [*measurements, {"step": step, **measure(average, data, options.noise)}]


@torch.no_grad()
def measure(flow: STARFlow, data: Data, noise: float) -> dict[str, float]:
    """Held-out nats per dimension with the right captions and with captions of other pictures."""
    rows = data.held_out.nonzero().squeeze(1)
    generator = torch.Generator().manual_seed(0)
    x = data.mean[rows] + noise * torch.randn(data.mean[rows].shape, generator=generator)
    other = rows[torch.randperm(len(rows), generator=generator)]
    right = torch.cat([flow(*pair).nll for pair in zip(x.split(64), data.text[rows].split(64), strict=True)])
    wrong = torch.cat([flow(*pair).nll for pair in zip(x.split(64), data.text[other].split(64), strict=True)])
    wins = (right < wrong)[(data.text[rows] != data.text[other]).flatten(1).any(1)].float().mean()
    gain = (wrong - right).mean() * x[0].numel()
    return {
        "nats_per_dim": round(right.mean().item(), 4),
        "shuffled": round(wrong.mean().item(), 4),
        "caption_gain": round(gain.item(), 2),  # nats per picture: comparable between VAEs
        "right_wins": round(wins.item(), 3),
    }


def draw(flow: STARFlow, vae: VAE, text_encoder: TextEncoder, options: argparse.Namespace) -> None:
    """Writes a grid: one row per guidance weight, one column per prompt."""
    text, null = text_encoder.encode(PROMPTS), text_encoder.encode([""] * len(PROMPTS))
    height, width = flow.config.grid
    pictures: list[np.ndarray] = []
    for guidance in options.guidance:
        noise = torch.randn(
            len(PROMPTS), vae.channels, height, width, generator=torch.Generator().manual_seed(options.seed)
        )
        latents = sample(flow, noise, text, null_text=null, guidance=guidance)
        latents = denoise(flow, latents, text, options.noise)
        pictures += list(to_pixels(vae.decode(latents)))
    captions = [*PROMPTS, *[""] * (len(pictures) - len(PROMPTS))]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    picture_grid(pictures, captions, columns=len(PROMPTS), scale=3).save(options.out)


def main() -> None:
    """One trial; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Train one flow on the emoji for a budget of CPU seconds.")
    parser.add_argument("--vae", default="emoji", help="emoji, or a folder")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 2, 6])
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--patch", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--noise", type=float, default=0.2, help="standard deviation added to the scaled latents")
    parser.add_argument("--autocast", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seconds", type=float, default=100.0, help="CPU seconds of training")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--guidance", type=float, nargs="+", default=[0.0, 2.0, 4.0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "starflow-emoji-preset")
    parser.add_argument("--out", type=Path, default=Path("emoji-preset.png"), help="grid of samples")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    vae, text_encoder = load_vae(options.vae), load_text_encoder("minilm", TEXT_LENGTH)
    data = load_data(options.cache, vae, text_encoder)
    side = RESOLUTION // vae.downsampling
    config = FlowConfig(
        width=options.width,
        layers=tuple(options.layers),
        channels=vae.channels,
        patch=options.patch,
        grid=(side, side),
        text_length=TEXT_LENGTH,
        text_width=text_encoder.width,
        head_dim=options.head_dim,
    )
    flow = STARFlow(config)
    parameters = sum(parameter.numel() for parameter in flow.parameters())
    average, measurements = train(flow, data, text_encoder.encode([""]), options)
    draw(average, vae, text_encoder, options)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    json.dump({**settings, "parameters": parameters, "measurements": measurements}, sys.stdout)
    print()


if __name__ == "__main__":
    main()
