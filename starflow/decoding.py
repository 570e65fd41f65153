"""Noise -> data: the blocks run token by token over a key/value cache, or window by window by Jacobi iteration.

One block solves u_i = z_i sigma_i(u_<i) + mean_i(u_<i). Sequentially that is T small steps. Jacobi iteration
guesses a window of tokens, evaluates the network on all of them at once and repeats with the result: after n
evaluations the first n tokens are exact, and usually many are close long before. (Song et al., arXiv 2002.03629;
for TARFlow: GS-Jacobi, arXiv 2505.12849, and selective Jacobi decoding, arXiv 2505.24791.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from starflow.model import Block, InverseOutput, KeyValues, STARFlow, at_least_float32, in_order
from starflow.packed import pack

#: Called with the tokens finished so far, over all blocks.
Progress = Callable[[int], None]


@dataclass
class Jacobi:
    """How to decode in parallel.

    tolerance: bound on the mean squared error against the sequential answer, relative to the signal's mean square.
    window: tokens evaluated at once.
    guess_from: evaluated tokens whose mean Gaussian gives an entering token's first guess; 0: its noise is the guess.
    blocks: over how many blocks the tolerance is shared.
    evaluations: network evaluations that each block took, filled by the decoder, first decoded block first.
    """

    tolerance: float = 1e-3
    window: int = 16
    guess_from: int = 4
    blocks: int = 1
    evaluations: list[int] = field(default_factory=list)


class BlockDecoder:
    """One block over its cache: sigma and mean (B, n, D) of a few tokens at a time.

    text: (R, L, E) states or (R,) labels; R = B, or 2B when guided, the null caption's rows last.
    """

    def __init__(
        self, block: Block, tokens: int, rotary: Tensor, text: Tensor | None, batch: int, guidance: float
    ) -> None:
        self.block, self.guidance = block, guidance
        self.layers = [pack(layer) for layer in block.layers]
        self.rows = batch if guidance == 0 else 2 * batch
        self.prefix_length = rotary.shape[1] - tokens if block.sees_text else 0
        self.rotary = rotary[:, rotary.shape[1] - tokens - self.prefix_length :]
        self.caches = self._caches(self.rows, self.prefix_length + tokens)
        ones = torch.full((tokens, self.prefix_length + tokens), -torch.inf, device=rotary.device)
        self.masks = ones.triu_(self.prefix_length + 1).to(block.embed.weight.dtype)
        if self.prefix_length and text is not None:
            self._prefill(text)

    def _caches(self, rows: int, length: int) -> list[KeyValues]:
        weight, head_dim = self.block.embed.weight, self.rotary.shape[-1]
        heads = len(weight) // head_dim
        return [KeyValues(rows, length, heads, head_dim, like=weight) for _ in self.layers]

    def _prefill(self, text: Tensor) -> None:
        """Runs the prefix once per distinct caption (all null captions are one) and copies it to its rows."""
        distinct, row = torch.unique(text, dim=0, return_inverse=True)
        h = self.block.prefix(distinct)
        assert h is not None
        prefills = self._caches(len(distinct), self.prefix_length)
        for layer, prefill, cache in zip(self.layers, prefills, self.caches, strict=True):
            prefill.mask = self.masks.new_full((self.prefix_length,) * 2, -torch.inf).triu_(1)
            h = layer(h, self.rotary[:, : self.prefix_length], prefill)
            cache.keys[:, : self.prefix_length] = prefill.keys[row]
            cache.values[:, : self.prefix_length] = prefill.values[row]

    def __call__(self, before: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """sigma, mean (B, n, D) of tokens start .. start + n - 1, given `before` (B, n, D), each one's predecessor.

        The cache must hold what precedes `start`; it then holds these tokens as well.
        """
        count = before.shape[1]
        first = self.prefix_length + start
        h = self.block.embed(before.to(self.block.embed.weight.dtype))
        if self.guidance:
            h = torch.cat([h, h])
        rotary = self.rotary[:, first : first + count]
        mask = None if count == 1 else self.masks[start : start + count, : first + count]
        for layer, cache in zip(self.layers, self.caches, strict=True):
            cache.start, cache.mask = first, mask
            h = layer(h, rotary, cache)
        sigma, mean = self.block.head(h)
        return guide(sigma, mean, self.guidance) if self.guidance else (sigma, mean)


def guide(sigma: Tensor, mean: Tensor, w: float) -> tuple[Tensor, Tensor]:
    """Classifier-free guidance of Gaussians (STARFlow, section on guidance): rows (2B, ...) -> (B, ...).

    The first half of the rows saw the caption, the second half the null caption.
    """
    (sigma_c, sigma_u), (mean_c, mean_u) = sigma.chunk(2), mean.chunk(2)
    s = (sigma_c / sigma_u).clamp(max=1).square()
    q = 1 + w - w * s
    return sigma_c * q.rsqrt(), ((1 + w) * mean_c - w * s * mean_u) / q


def decode_sequential(decoder: BlockDecoder, z: Tensor, progress: Progress) -> tuple[Tensor, Tensor]:
    """u and log sigma (B, T, D), one token at a time: the exact answer."""
    u, sigmas = torch.empty_like(z), torch.empty_like(z)
    before = decoder.block.start.to(z.dtype).expand(len(z), 1, -1)
    for i in range(z.shape[1]):
        sigma, mean = decoder(before, i)
        sigmas[:, i : i + 1] = sigma
        before = torch.addcmul(mean, z[:, i : i + 1], sigma)
        u[:, i : i + 1] = before
        progress(1)
    return u, sigmas.log_()


def decode_jacobi(decoder: BlockDecoder, z: Tensor, jacobi: Jacobi, progress: Progress) -> tuple[Tensor, Tensor]:
    """u and log sigma (B, T, D) by Jacobi iteration on a sliding window.

    Each evaluation releases the tokens at the front of the window whose predecessors no longer move (at least
    one: the first is exact) and lets as many enter at the back. An entering token starts from its noise under
    the mean Gaussian of the last tokens evaluated, which is nearer than the noise itself.
    """
    tokens = z.shape[1]
    sequence = torch.cat([decoder.block.start.to(z.dtype).expand(len(z), 1, -1), z], dim=1)
    u, sigmas = sequence[:, 1:], torch.empty_like(z)  # `sequence` holds each token's predecessor
    stop = StoppingRule(jacobi.tolerance / jacobi.blocks)
    start = evaluations = 0
    while start < tokens:
        end = min(start + jacobi.window, tokens)
        sigma, mean = decoder(sequence[:, start:end], start)
        new = torch.addcmul(mean, z[:, start:end], sigma)
        change = (new - u[:, start:end]).square().mean(-1).amax(0) / new.square().mean()
        u[:, start:end], sigmas[:, start:end] = new, sigma
        released = stop(change)
        entering = slice(end, min(end + released, tokens))
        if jacobi.guess_from:
            last = slice(-jacobi.guess_from, None)
            u[:, entering] = z[:, entering] * sigma[:, last].mean(1, True) + mean[:, last].mean(1, True)
        evaluations += 1
        progress(released)
        start += released
    jacobi.evaluations.append(evaluations)
    return u.contiguous(), sigmas.log_()


class StoppingRule:
    """How many tokens at the front of the window are close enough to the sequential answer.

    Where an iteration moves its tokens by d and the next one moves them by g d, the distance that is left is at
    most d g / (1 - g) (the fixed point of a contraction). So a token is released after the first that moved by
    more than min(1, (1 - g) / g) sqrt(tolerance): the left distance is then below the tolerance, and so is
    what the cache holds of the tokens before. g is measured, the largest of the recent evaluations; where it is
    1 or more only exact tokens are released.
    """

    #: The measured contraction is forgotten by this factor per evaluation; 0.7 is assumed at first.
    FORGET, FIRST = 0.8, 0.7

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self.contraction = self.FIRST
        self.waiting: Tensor | None = None

    def __call__(self, change: Tensor) -> int:
        """change: (n,) mean square by which each token moved, relative; returns the tokens to release, 1 .. n."""
        if self.waiting is not None and len(self.waiting):
            moved = change[: len(self.waiting)].sum() / self.waiting.sum().clamp(min=1e-30)
            self.contraction = max(float(moved) ** 0.5, self.FORGET * self.contraction)
        g = self.contraction
        limit = self.tolerance * min(1.0, (max(0.0, 1 - g) / max(g, 1e-6)) ** 2)
        far = (change > limit).nonzero()
        released = min(int(far[0]) + 1, len(change)) if len(far) else len(change)
        self.waiting = change[released:]
        return released


def invert(
    model: STARFlow,
    z: Tensor,
    text: Tensor | None,
    null_text: Tensor | None = None,
    guidance: float = 0.0,
    jacobi: Jacobi | None = None,
    progress: Progress = lambda tokens: None,
) -> InverseOutput:
    """Noise z (B, C, H, W) -> data and log |dx/dz|; arguments as in `starflow.sampling.sample`."""
    grid, text = model.check(z, text)
    if guidance:
        _, null_text = model.check(z, null_text)
    u = model.patchify(at_least_float32(z))
    rotary = model.rotary(grid, u.device, u.dtype)
    logdets = []
    if jacobi is not None:
        jacobi.blocks = len(model.blocks)
    for k in reversed(range(len(model.blocks))):
        block: Block = model.blocks[k]  # type: ignore[assignment]
        guided = guidance if block.sees_text else 0.0
        rows = torch.cat([text, null_text]) if guided and text is not None and null_text is not None else text
        decoder = BlockDecoder(block, u.shape[1], rotary, rows, len(u), guided)
        u = in_order(k, u)
        if jacobi is None:
            u, logdet = decode_sequential(decoder, u, progress)
        else:
            u, logdet = decode_jacobi(decoder, u, jacobi, progress)
        u = in_order(k, u)
        logdets.append(logdet)
    return InverseOutput(model.unpatchify(u, grid), logdets[::-1])
