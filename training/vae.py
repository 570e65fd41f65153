"""Trains a small `AutoencoderKL` on a folder of pictures: the VAE that the emoji demo ships was made by it.

Loss: L1 + 0.5 MSE on the pixels + `kl_weight` KL, the pixel part on latents with a random share of Gaussian
noise: a flow is trained on noised latents, so what it samples must decode to the same colours.
"""

from __future__ import annotations

import copy
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from starflow.config import Config
from starflow.encoders import new_autoencoder
from starflow.errors import ConfigError
from starflow.images import decode_image, fit

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"}


class VAETrainConfig(Config):
    """What `starflow train-vae` does."""

    images: Path = Field(description="Folder of pictures, searched recursively.")
    out: Path = Field(description="Folder for config.json and the weights, in diffusers' layout.")
    resolution: int = Field(32, description="Pictures are scaled and cropped to this many pixels a side.")
    channels: int = Field(4, description="Latent channels.")
    widths: tuple[int, ...] = Field(
        (32, 64), description="Channels per level; each level after the first halves the resolution."
    )
    layers: int = Field(1, description="Residual blocks per encoder level; the decoder has one more.")
    steps: int = Field(10_000, gt=0, description="Optimizer steps.")
    batch_size: int = Field(64, gt=0, description="Pictures per step.")
    learning_rate: float = Field(2e-3, description="Peak learning rate; cosine decay after 2 % of warm-up.")
    latent_noise: float = Field(
        0.3, description="Largest noise added to latents in training, in standard deviations of the latents."
    )
    kl_weight: float = Field(1e-6, description="Weight of the posterior's divergence from a standard normal.")
    held_out: float = Field(0.05, gt=0, lt=1, description="Share of the folders (or pictures) to measure on.")
    validate_every: int = Field(500, gt=0, description="Steps between measurements; the best weights are kept.")
    seed: int = Field(0, description="Seed of the split, the initial weights, the batches and the noise.")
    precision: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="Of the convolutions in training (autocast); weights and measurements are float32."
    )
    device: str = Field("cpu", description="Torch device.")


@dataclass(frozen=True)
class VAEReport:
    """Held-out quality of the weights written, in decibels (peak signal: the full range of a pixel)."""

    step: int
    psnr: float
    psnr_noisy: float  # with Gaussian noise of 0.2 latent standard deviations
    scaling_factor: float
    parameters: int
    seconds: float


def load_folder(folder: Path, resolution: int, held_out: float, seed: int) -> tuple[Tensor, Tensor]:
    """Reads every picture under `folder` into memory: (train, held-out), each (N, 3, R, R) uint8.

    Pictures in one sub-folder are variants of one another, so they stay together on one side of the split;
    pictures directly in `folder` are split one by one. Raises ConfigError when there are fewer than two groups.
    """
    groups: dict[Path, list[Path]] = defaultdict(list)
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in SUFFIXES:
            groups[file.parent if file.parent != folder else file].append(file)
    if len(groups) < 2:
        raise ConfigError(f"{folder} holds {len(groups)} pictures (or folders of them); training needs two or more")
    names = list(groups)
    random.Random(seed).shuffle(names)
    count = max(1, round(held_out * len(names)))
    return _read(names[count:], groups, resolution), _read(names[:count], groups, resolution)


def _read(names: list[Path], groups: dict[Path, list[Path]], resolution: int) -> Tensor:
    files = [file for name in names for file in groups[name]]
    pixels = np.stack([fit(decode_image(file.read_bytes()), resolution, resolution) for file in files])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def build(config: VAETrainConfig) -> Any:
    """The `AutoencoderKL` of `config` with random weights."""
    # One channel a group would subtract each channel's mean, and with it the colour of flat areas.
    groups = math.gcd(8, *config.widths)
    return new_autoencoder(config.resolution, config.channels, config.widths, config.layers, groups)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up to `peak` over the first 2 % of the steps, then cosine decay to zero."""
    warmup = max(1, steps // 50)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def loss_of(vae: Any, images: Tensor, config: VAETrainConfig, generator: torch.Generator) -> Tensor:
    """The training loss (see the module's docstring) of `images` (B, 3, R, R) in [-1, 1]; a scalar."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        posterior = vae.encode(images).latent_dist
        latents = posterior.mean + posterior.std * _noise(posterior.mean, generator)
        share = config.latent_noise * torch.rand(len(images), 1, 1, 1, generator=generator).to(images.device)
        # Relative to the latents' own spread: growing the latents is no way around the noise.
        noisy = latents + share * latents.std() * _noise(latents, generator)
        pixels = vae.decode(noisy).sample.float()
    return F.l1_loss(pixels, images) + 0.5 * F.mse_loss(pixels, images) + config.kl_weight * posterior.kl().mean()


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal values of the shape of `like`, the same on every device."""
    return torch.randn(like.shape, generator=generator).to(like.device)


@torch.no_grad()
def psnr(vae: Any, images: Tensor, noise: float = 0.0, batch: int = 256) -> float:
    """Mean over `images` (N, 3, R, R) uint8 of the PSNR in dB, decoded from means with `noise` standard deviations."""
    generator = torch.Generator().manual_seed(0)
    values = []
    for part in images.split(batch):
        target = unit(part).to(vae.device)
        latents = vae.encode(target).latent_dist.mean
        latents = latents + noise * latents.std() * _noise(latents, generator)
        values.append(decibels(vae.decode(latents).sample.clamp(-1, 1), target))
    return torch.cat(values).mean().item()


def decibels(decoded: Tensor, target: Tensor) -> Tensor:
    """PSNR of each of B pictures in [-1, 1], (B,)."""
    return -10 * torch.log10(((decoded - target) / 2).square().mean((1, 2, 3)).clamp(min=1e-10))


@torch.no_grad()
def measure_scaling_factor(vae: Any, images: Tensor, batch: int = 256) -> float:
    """1 / standard deviation of the latents of `images` (N, 3, R, R) uint8, so that scaled latents have deviation 1."""
    means = [vae.encode(unit(part).to(vae.device)).latent_dist.mean.cpu() for part in images.split(batch)]
    return 1 / torch.cat(means).std().item()


def unit(pixels: Tensor) -> Tensor:
    """uint8 pixels to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def train(config: VAETrainConfig, on_progress: Callable[[int, float, VAEReport | None], None]) -> VAEReport:
    """Trains and writes to `config.out`; calls `on_progress(step, loss, report)`, with a report at measurements.

    The weights measured and kept are a moving average over the steps. Returns the report of the weights written.
    """
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    images, held_out = load_folder(config.images, config.resolution, config.held_out, config.seed)
    vae = build(config).to(config.device)
    average = copy.deepcopy(vae).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    start, best = time.monotonic(), None
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.steps, config.learning_rate)
        batch = unit(images[torch.randint(len(images), (config.batch_size,), generator=generator)])
        batch = torch.where(torch.rand(len(batch), 1, 1, 1, generator=generator) < 0.5, batch, batch.flip(-1))
        loss = loss_of(vae, batch.to(config.device), config, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        decay = min(0.999, (1 + step) / (10 + step))  # short memory at first, so that early weights are usable
        for mean, value in zip(average.parameters(), vae.parameters(), strict=True):
            mean.lerp_(value.detach(), 1 - decay)
        report = None
        if (step + 1) % config.validate_every == 0 or step + 1 == config.steps:
            report = _measure(average, images, held_out, step + 1, time.monotonic() - start)
            if best is None or report.psnr_noisy >= best.psnr_noisy:
                best = report
                _save(average, report, config.out)
        on_progress(step + 1, loss.item(), report)
    assert best is not None  # the last step always measures
    return best


def _measure(vae: Any, images: Tensor, held_out: Tensor, step: int, seconds: float) -> VAEReport:
    return VAEReport(
        step=step,
        psnr=psnr(vae, held_out),
        psnr_noisy=psnr(vae, held_out, noise=0.2),
        scaling_factor=measure_scaling_factor(vae, images[:1024]),
        parameters=sum(parameter.numel() for parameter in vae.parameters()),
        seconds=seconds,
    )


def _save(vae: Any, report: VAEReport, out: Path) -> None:
    vae.register_to_config(scaling_factor=report.scaling_factor)
    vae.save_pretrained(out)
