"""Noise -> data: the blocks run token by token over a key/value cache, or window by window by Jacobi iteration.

One block solves u_i = z_i sigma_i(u_<i) + mean_i(u_<i). Sequentially that is T small steps. Jacobi iteration
guesses a window of tokens, evaluates the network on all of them at once and repeats with the result: after n
evaluations the first n tokens are exact, and usually many are close long before. (Song et al., arXiv 2002.03629;
for TARFlow: GS-Jacobi, arXiv 2505.12849, and selective Jacobi decoding, arXiv 2505.24791.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from starflow.model import Block, InverseOutput, STARFlow, at_least_float32, in_order
from starflow.packed import pack

#: Called with the tokens finished so far, over all blocks.
Progress = Callable[[int], None]
#: Which tokens a call is about: a slice, or (n,) int64 positions on the device where shapes must not change.
Place = slice | Tensor


@dataclass
class Jacobi:
    """How to decode in parallel.

    tolerance: bound on the mean squared error against the sequential answer, relative to the signal's mean square.
    window: tokens evaluated at once; None: `best_window` of each block.
    guess_from: evaluated tokens whose mean Gaussian gives an entering token's first guess; 0: its noise is the guess.
    evaluations: (network evaluations, window) of each block, filled by the decoder, first decoded block first.
    """

    tolerance: float = 1e-3
    window: int | None = None
    guess_from: int = 4
    evaluations: list[tuple[int, int]] = field(default_factory=list)


#: Factor of `best_window` by type of device: measured on a CPU (benchmarks/sampling.py), by arithmetic elsewhere.
WINDOW_FACTOR = {"cpu": 4.0, "cuda": 14.0}


def best_window(tokens: int, rows: int, device: str) -> int:
    """The window that takes a block of `tokens` tokens and `rows` rows (guided ones count twice) the least time.

    With a window of n, T tokens and R rows take about a T / n + b evaluations of c + d n R seconds, c being the time
    to read the weights. The product is least where n = sqrt(a c / (b d)) sqrt(T / R); the first root is WINDOW_FACTOR.
    """
    return min(tokens, max(1, round(WINDOW_FACTOR.get(device, WINDOW_FACTOR["cuda"]) * math.sqrt(tokens / rows))))


class KeyValues:
    """Preallocated keys (already rotated) and values of one layer while it runs token by token.

    keys, values: (R, S, N, d) for R rows and S positions; zero, not arbitrary, where nothing was written yet.
    The caller sets for each call of n tokens: `place`, where they are; `end`, how many positions they look at; and
    `mask` (n, end), additive, unless each of them may look at all of those.
    """

    def __init__(self, rows: int, length: int, heads: int, head_dim: int, like: Tensor) -> None:
        self.keys = like.new_zeros(rows, length, heads, head_dim)
        self.values = torch.zeros_like(self.keys)
        self.place: Place = slice(0, 0)
        self.end = 0
        self.mask: Tensor | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of q (R, n, N, d) over what precedes and itself, after storing k and v at `place`."""
        self.keys[:, self.place] = k
        self.values[:, self.place] = v
        keys, values = self.keys[:, : self.end].transpose(1, 2), self.values[:, : self.end].transpose(1, 2)
        return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, self.mask).transpose(1, 2)


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
        length = self.prefix_length
        prefills = self._caches(len(distinct), length)
        mask = self.masks.new_full((length, length), -torch.inf).triu_(1)
        for layer, prefill, cache in zip(self.layers, prefills, self.caches, strict=True):
            prefill.place, prefill.end, prefill.mask = slice(0, length), length, mask
            h = layer(h, self.rotary[:, :length], prefill)
            cache.keys[:, :length] = prefill.keys[row]
            cache.values[:, :length] = prefill.values[row]

    def __call__(self, before: Tensor, place: Place, end: int) -> tuple[Tensor, Tensor]:
        """sigma, mean (B, n, D) of the n consecutive tokens at `place`, given `before` (B, n, D), their predecessors.

        end: how many tokens to look at; those after a token's own place are masked. With positions as a tensor
        and an `end` above the last one, this computes the same as with a slice that ends at `end`, in shapes that
        do not depend on the place. The cache must hold what precedes, and then holds these tokens as well.
        """
        prefix = self.prefix_length
        if isinstance(place, slice):
            inside: Place = slice(place.start + prefix, place.stop + prefix)
            mask = None if before.shape[1] == 1 else self.masks[place, : prefix + end]
        else:
            inside, mask = place + prefix, self.masks[place, : prefix + end]
        h = self.block.embed(before.to(self.block.embed.weight.dtype))
        if self.guidance:
            h = torch.cat([h, h])
        rotary = self.rotary[:, inside]
        for layer, cache in zip(self.layers, self.caches, strict=True):
            cache.place, cache.end, cache.mask = inside, prefix + end, mask
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


class Steps:
    """Runs `step(place, end)` on a window of `size` tokens that moves over a sequence.

    On a CPU the place is a slice and exactly what precedes is looked at. On a GPU, where starting kernels takes
    longer than running them, shapes are fixed: the place is a tensor on the device and `end` a multiple of BUCKET, so
    that one CUDA graph for each bucket replays all of its steps. At the end of the sequence the window stays full
    and reaches back instead. `step` must be a function of its arguments and of tensors that it updates in place.
    """

    #: Tokens by which what is looked at grows from one graph to the next.
    BUCKET = 256
    #: Device types with fixed shapes.
    FIXED = ("cuda",)

    def __init__(self, step: Callable[[Place, int], Any], tokens: int, size: int, device: torch.device) -> None:
        self.step, self.tokens, self.size, self.device = step, tokens, min(size, tokens), device
        self.offsets = torch.arange(self.size, device=device)
        self.place = self.offsets.clone()
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Any]] = {}

    def __call__(self, start: int) -> Any:
        """What `step` returns for the tokens from `start`; on a GPU valid until the next call."""
        stop = min(start + self.size, self.tokens)
        if self.device.type not in self.FIXED:
            return self.step(slice(start, stop), stop)
        torch.add(self.offsets, stop - self.size, out=self.place)
        end = min(self.tokens, -(-stop // self.BUCKET) * self.BUCKET)
        if end in self.graphs:
            graph, outputs = self.graphs[end]
            graph.replay()
            return outputs
        outputs = self.step(self.place, end)
        if self.device.type == "cuda":
            self._capture(end)
        return outputs

    def _capture(self, end: int) -> None:
        """Records the step that has just run, which initialised all that may not be initialised while recording."""
        graph = torch.cuda.CUDAGraph()
        pool = next((other.pool() for other, _ in self.graphs.values()), None)
        stream = recording_stream(self.device)
        # Only this thread is recorded: others (a loader that pins memory) may go on as they like.
        with (
            torch.cuda.device(self.device),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            outputs = self.step(self.place, end)
        self.graphs[end] = graph, outputs


@lru_cache
def recording_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of `device` on which its graphs are recorded.

    PyTorch's own lies on whichever GPU was current when it was first needed; recorded there, work of another GPU
    would leave the graph empty. One for all graphs: libraries keep a workspace for every stream they have seen.
    """
    return torch.cuda.Stream(device)


def decode_sequential(decoder: BlockDecoder, z: Tensor, progress: Progress) -> tuple[Tensor, Tensor]:
    """u and log sigma (B, T, D), one token at a time: the exact answer."""
    sequence = torch.cat([decoder.block.start.to(z.dtype).expand(len(z), 1, -1), z], dim=1)
    u, sigmas = sequence[:, 1:], torch.empty_like(z)  # `sequence` holds each token's predecessor

    def step(place: Place, end: int) -> None:
        sigma, mean = decoder(sequence[:, place], place, end)
        u[:, place] = torch.addcmul(mean, z[:, place], sigma)
        sigmas[:, place] = sigma.to(z.dtype)  # float64 noise may meet a float32 network

    steps = Steps(step, z.shape[1], 1, z.device)
    for i in range(z.shape[1]):
        steps(i)
        progress(1)
    return u.contiguous(), sigmas.log_()


def decode_jacobi(
    decoder: BlockDecoder, z: Tensor, jacobi: Jacobi, tolerance: float, progress: Progress
) -> tuple[Tensor, Tensor]:
    """u and log sigma (B, T, D) by Jacobi iteration on a sliding window, within this block's `tolerance`.

    Each evaluation releases the tokens at the front of the window whose predecessors no longer move (at least
    one: the first is exact) and lets as many enter at the back. An entering token starts from its noise under
    the mean Gaussian of the last tokens evaluated, which is nearer than the noise itself.
    """
    tokens = z.shape[1]
    window = jacobi.window or best_window(tokens, decoder.rows, z.device.type)
    sequence = torch.cat([decoder.block.start.to(z.dtype).expand(len(z), 1, -1), z], dim=1)
    u, sigmas = sequence[:, 1:], torch.empty_like(z)

    def step(place: Place, end: int) -> tuple[Tensor, Tensor, Tensor]:
        sigma, mean = decoder(sequence[:, place], place, end)
        new = torch.addcmul(mean, z[:, place], sigma)
        change = (new - u[:, place]).square().mean(-1).amax(0) / new.square().mean()
        u[:, place] = new
        sigmas[:, place] = sigma.to(z.dtype)
        return sigma, mean, change

    steps, stop = Steps(step, tokens, window, z.device), StoppingRule(tolerance)
    start = evaluations = 0
    while start < tokens:
        sigma, mean, change = steps(start)
        end = min(start + window, tokens)
        released = stop(change[start - end :])
        entering = slice(end, min(end + released, tokens))
        if jacobi.guess_from:
            last = slice(-jacobi.guess_from, None)
            u[:, entering] = z[:, entering] * sigma[:, last].mean(1, True) + mean[:, last].mean(1, True)
        evaluations += 1
        progress(released)
        start += released
    jacobi.evaluations.append((evaluations, window))
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
        change = change.cpu()  # the only wait for a GPU; and a replayed graph overwrites the original
        if self.waiting is not None and len(self.waiting):
            moved = change[: len(self.waiting)].sum() / self.waiting.sum().clamp(min=1e-30)
            self.contraction = max(float(moved) ** 0.5, self.FORGET * self.contraction)
        g = self.contraction
        limit = self.tolerance * min(1.0, (max(0.0, 1 - g) / max(g, 1e-6)) ** 2)
        far = (change > limit).nonzero()
        released = min(int(far[0]) + 1, len(change)) if len(far) else len(change)
        self.waiting = change[released:]
        return released


@torch.no_grad()
def invert(
    model: STARFlow,
    z: Tensor,
    text: Tensor | None,
    null_text: Tensor | None = None,
    guidance: float = 0.0,
    jacobi: Jacobi | None = None,
    progress: Progress = lambda tokens: None,
) -> InverseOutput:
    """Noise z (B, C, H, W) -> data and log |dx/dz|, without gradients; arguments as in `starflow.sampling.sample`."""
    grid, text = model.check(z, text)
    if guidance:
        _, null_text = model.check(z, null_text)
    u = model.patchify(at_least_float32(z))
    rotary = model.rotary(grid, u.device, u.dtype)
    guided = [guidance if block.sees_text else 0.0 for block in model.blocks]
    # What an evaluation of each block costs: a costly block gets as much more of the tolerance, which is shared.
    costs = [layers * (2 if w else 1) for layers, w in zip(model.config.layers, guided, strict=True)]
    logdets = []
    with torch.autocast(u.device.type, enabled=False):  # caches and packed weights have the type of the weights
        for k in reversed(range(len(model.blocks))):
            block: Block = model.blocks[k]  # type: ignore[assignment]
            rows = torch.cat([text, null_text]) if guided[k] and text is not None and null_text is not None else text
            decoder = BlockDecoder(block, u.shape[1], rotary, rows, len(u), guided[k])
            u = in_order(k, u)
            if jacobi is None:
                u, logdet = decode_sequential(decoder, u, progress)
            else:
                u, logdet = decode_jacobi(decoder, u, jacobi, jacobi.tolerance * costs[k] / sum(costs), progress)
            u = in_order(k, u)
            logdets.append(logdet)
    return InverseOutput(model.unpatchify(u, grid), logdets[::-1])
