"""Sampling: noise to latents, guided, sequentially or by Jacobi iteration; denoising by the model's own score."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from starflow.decoding import Jacobi, Progress, invert
from starflow.model import STARFlow

Method = Literal["sequential", "jacobi"]


def sample(
    model: STARFlow,
    noise: Tensor,
    text: Tensor | None = None,
    null_text: Tensor | None = None,
    guidance: float = 0.0,
    method: Method = "sequential",
    tolerance: float = 1e-3,
    window: int | None = None,
    progress: Progress = lambda tokens: None,
) -> Tensor:
    """Draws latents (B, C, H, W), float32 at least, from standard normal `noise` of that shape (any grid).

    text: (B, L, E) states, (B,) labels or None, as in `STARFlow.forward`; every row may be another prompt.
    null_text: the text encoder's states of "", (B, L, E) or (1, L, E); needed when `guidance` is not 0. A
        class-conditional model takes its "no label" embedding instead.
    guidance: w of classifier-free guidance on the text block's Gaussians; 0 is none.
    method: "sequential" is exact; "jacobi" differs from it by a mean squared error below `tolerance` times the
        sample's mean square, evaluating `window` tokens at once (None: `best_window` of each block).
    progress: called with the number of tokens just finished; there are tokens x blocks in all.

    The network runs in the dtype of its weights, the Gaussians and the sample in float32.
    Raises ValueError for shapes, methods and numbers that cannot be.
    """
    if method not in ("sequential", "jacobi"):
        raise ValueError(f"method {method!r} is not one of 'sequential', 'jacobi'")
    if not (math.isfinite(guidance) and guidance >= 0):
        raise ValueError(f"guidance {guidance} must be finite and at least 0")
    if tolerance <= 0 or (window is not None and window < 1):
        raise ValueError(f"tolerance {tolerance} must be above 0 and window {window} at least 1")
    if guidance and model.config.text_length:
        if null_text is None:
            raise ValueError(f"guidance {guidance} needs null_text, the text encoder's states of the empty caption")
        if null_text.shape[0] == 1:
            null_text = null_text.expand(len(noise), -1, -1)
    if not model.config.text_length:
        null_text = None  # which stands for the "no label" embedding, in as many rows as there are
    jacobi = Jacobi(tolerance, window) if method == "jacobi" else None
    with torch.inference_mode():
        x = invert(model, noise, text, null_text, guidance, jacobi, progress).x
    return x.clone()  # outside inference mode, so that the caller may differentiate through it


def draw_noise(seed: int, index: int, shape: tuple[int, int, int]) -> Tensor:
    """(C, H, W) standard normal noise of picture `index` under `seed`: the same whatever the batch or device."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
    return torch.randn(shape, generator=generator)


def denoise(model: STARFlow, x: Tensor, text: Tensor | None, noise_std: float) -> Tensor:
    """x + noise_std^2 * gradient of log p(x | text): the expected clean latent (Tweedie), (B, C, H, W).

    noise_std: the Gaussian noise that training added to the latents. The backward pass recomputes each layer, so that
    a batch that fits while it is drawn fits here, too; the weights need no gradient.
    """
    with torch.enable_grad(), _for_its_input(model):
        x = x.detach().clone().requires_grad_()
        log_likelihood = -model(x, text).nll.sum() * x[0].numel()
        (score,) = torch.autograd.grad(log_likelihood, x)
    return (x + noise_std**2 * score).detach()


@contextmanager
def _for_its_input(model: STARFlow) -> Iterator[None]:
    """Inside, gradients go to the input alone, and activations are recomputed."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    checkpointing = model.checkpointing
    try:
        model.checkpointing = "full"
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        model.checkpointing = checkpointing
        for parameter in learning:
            parameter.requires_grad_(True)
