"""What an exact density gives: scores, maps, image <-> noise, interpolation, inpainting, typicality.

All of it works on latents; `starflow.generate` does the same on pictures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from starflow.decoding import Jacobi, Progress, invert
from starflow.model import STARFlow, in_order


@dataclass(frozen=True)
class Score:
    """Log-densities of latents: `nats` (B,) natural-log units a sample, `per_token` (B, H/p, W/p) their parts.

    `per_token.sum((1, 2)) == nats`; `values` is the number of values in a sample.
    """

    nats: Tensor
    per_token: Tensor
    values: int

    @property
    def bits_per_dim(self) -> Tensor:
        """(B,) negative log2 density per value: lower is likelier."""
        return -self.nats / (self.values * math.log(2))


@torch.inference_mode()
def score(model: STARFlow, x: Tensor, text: Tensor | None = None) -> Score:
    """Exact log p(x | text) of latents (B, C, H, W), split over tokens in grid order.

    The part of a token is the log-density of its noise plus its log-determinants in all blocks.
    """
    output = model(x, text)
    noise = output.states[-1]  # (B, T, D)
    parts = -0.5 * (noise.square() + math.log(2 * math.pi))
    for k, logdet in enumerate(output.logdets):
        parts = parts + in_order(k, logdet)
    height, width = model.config.tokens(*x.shape[2:])
    per_token = parts.sum(-1).unflatten(1, (height, width))
    return Score(per_token.sum((1, 2)), per_token, x[0].numel())


def explained(model: STARFlow, x: Tensor, text: Tensor | None, null_text: Tensor | None) -> Score:
    """log p(x | text) - log p(x | null caption): how much the caption says about the picture, and where."""
    given, alone = score(model, x, text), score(model, x, null_text)
    return Score(given.nats - alone.nats, given.per_token - alone.per_token, given.values)


@torch.inference_mode()
def encode(model: STARFlow, x: Tensor, text: Tensor | None = None) -> Tensor:
    """Latents to noise, both (B, C, H, W)."""
    return model(x, text).z


@torch.inference_mode()
def decode(
    model: STARFlow,
    z: Tensor,
    text: Tensor | None = None,
    jacobi: Jacobi | None = None,
    progress: Progress = lambda tokens: None,
) -> Tensor:
    """Noise to latents, the exact inverse of `encode` (within `jacobi.tolerance` if given).

    progress: as in `starflow.sampling.sample`.
    """
    return invert(model, z, text, jacobi=jacobi, progress=progress).x


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Great-circle interpolation (B, ...): stays at the radius where the noise of real pictures lies."""
    x, y = a.flatten(1), b.flatten(1)
    cosine = torch.nn.functional.cosine_similarity(x, y, dim=1).clamp(-1, 1)
    angle = cosine.acos().reshape(-1, *[1] * (a.ndim - 1))
    sine = angle.sin()
    straight = torch.lerp(a, b, t)
    arc = ((1 - t) * angle).sin() / sine * a + (t * angle).sin() / sine * b
    return torch.where(sine > 1e-4, arc, straight)


@torch.inference_mode()
def interpolate(
    model: STARFlow,
    x: Tensor,
    text: Tensor | None,
    steps: int,
    jacobi: Jacobi | None = None,
    progress: Progress = lambda tokens: None,
) -> Tensor:
    """(steps, C, H, W) from x[0] to x[1] (2, C, H, W) along the arc between their noises.

    text: (2, L, E), the caption of each end; its states are blended linearly. Labels must agree.
    Raises ValueError for fewer than two steps, another number of ends or labels that differ.
    """
    if steps < 2 or len(x) != 2:
        raise ValueError(f"interpolation over {steps} steps between {len(x)} images; at least 2 steps between 2 images")
    z = encode(model, x, text)
    positions = torch.linspace(0, 1, steps).tolist()
    path = torch.cat([slerp(z[:1], z[1:], t) for t in positions])
    if text is not None and text.is_floating_point():
        text = torch.cat([torch.lerp(text[:1], text[1:], t) for t in positions])
    elif text is not None:
        if text[0] != text[1]:
            raise ValueError(f"labels {text.tolist()} differ; labels cannot be blended")
        text = text[:1].expand(steps)
    return decode(model, path, text, jacobi, progress)


@torch.inference_mode()
def inpaint(
    model: STARFlow,
    x: Tensor,
    mask: Tensor,
    text: Tensor | None = None,
    rounds: int = 8,
    seed: int = 0,
    jacobi: Jacobi | None = None,
    progress: Progress = lambda tokens: None,
) -> Tensor:
    """Fills the masked part of latents x (B, C, H, W) without training; the rest stays as it is.

    mask: (B, 1, H, W) or (1, 1, H, W) bool, true where to fill; whole patches.

    After the paper's training-free inpainting: fill the hole with noise, map to noise space, keep the noise of
    the known part, draw that of the hole anew, map back, put the known part in again, repeat. Here the exact
    likelihood steers it: each round moves the hole's noise by a step that keeps it standard normal (smaller
    towards the end), and a proposal is accepted with probability min(1, p(new) / p(old)).
    """
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1:] != (1, *x.shape[2:]):
        raise ValueError(f"mask {mask.dtype} {tuple(mask.shape)} must be bool (B, 1, {x.shape[2]}, {x.shape[3]})")
    if rounds < 1:
        raise ValueError(f"rounds {rounds} must be at least 1")
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(x.shape, generator=generator).to(x)

    best = torch.where(mask, normal(), x)
    old = torch.full((len(x),), -torch.inf, device=x.device)
    for index in range(rounds):
        step = 1 - 0.7 * index / rounds
        z = encode(model, best, text)
        moved = math.sqrt(1 - step**2) * z + step * normal()
        proposal = torch.where(mask, decode(model, torch.where(mask, moved, z), text, jacobi, progress), x)
        new = score(model, proposal, text).nats
        accepted = torch.rand(len(x), generator=generator).to(new).log() < new - old
        best = torch.where(accepted.reshape(-1, 1, 1, 1), proposal, best)
        old = torch.where(accepted, new, old)
    return best


@dataclass(frozen=True)
class Typicality:
    """Where an image lies in the likelihood distribution of a reference set.

    reference: (N,) nats per dimension (log-densities divided by the number of values), so that grids compare.
    """

    reference: Tensor

    def percentile(self, nats: Tensor) -> Tensor:
        """(B,) share of the reference set that is less likely, 0 .. 100: near 0 too unlikely, near 100 too likely."""
        return 100 * (self.reference < nats.unsqueeze(1)).double().mean(1)

    def p_value(self, nats: Tensor) -> Tensor:
        """(B,) probability that a picture of the reference set lies at least as far from its median.

        Two-sided, because outliers are often *too* likely (flat pictures); exact for exchangeable pictures.
        """
        median = self.reference.median()
        distance = (self.reference - median).abs()
        beyond = (distance >= (nats - median).abs().unsqueeze(1)).sum(1)
        return (1 + beyond.double()) / (1 + len(self.reference))
