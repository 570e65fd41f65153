"""Speed and error of sampling: how fast, what each means gains, and which windows suit which block.

    python benchmarks/sampling.py                      # the CPU shape: 11.2 M parameters, guided, float32
    python benchmarks/sampling.py --device cuda        # the released 3.8 B shape, guided, bfloat16
    python benchmarks/sampling.py --tables gains       # one of the three tables: speed, gains, windows

Weights are drawn with a standard deviation of 0.05 (on a GPU scaled with the width), so that nothing converges by
accident. Errors are mean squared differences from the sequential answer, relative to its mean square; "evaluations"
are network evaluations a token, counting each token of each window.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from train_step import SMALL, machine, write

from starflow import decoding, flops
from starflow.decoding import BlockDecoder, Jacobi, Steps, StoppingRule, best_window, guide, invert
from starflow.model import Block, FlowConfig, STARFlow, in_order
from starflow.presets import PRESETS

GUIDANCE = 2.0
TITLES = {
    "speed": "Sampling, guided",
    "gains": "What each means of decoding gains, each line with those above it",
    "windows": "Jacobi decoding by window: time of the guided deep block and of the unguided shallow ones",
}


class Inputs(NamedTuple):
    """Noise (B, C, H, W), captions and null captions (B, L, E)."""

    noise: Tensor
    text: Tensor
    null: Tensor


def random_model(config: FlowConfig, device: str) -> STARFlow:
    torch.manual_seed(0)
    with torch.device(device):
        flow = STARFlow(config).eval()
    with torch.no_grad():
        for parameter in flow.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.05 * (256 / config.width) ** 0.5)
    return flow.bfloat16() if device == "cuda" else flow


def inputs(config: FlowConfig, batch: int, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(batch, config.channels, *config.grid, generator=generator)
    text = torch.randn(batch, config.text_length, config.text_width, generator=generator)
    null = torch.randn(1, config.text_length, config.text_width, generator=generator).expand_as(text)
    return Inputs(noise.to(device), text.to(device), null.to(device))


def draw(flow: STARFlow, given: Inputs, jacobi: Jacobi | None) -> Tensor:
    if jacobi is not None:
        jacobi.evaluations.clear()
    return invert(flow, *given, GUIDANCE, jacobi).x


def best(sample: Callable[[], Tensor], repeats: int) -> tuple[float, Tensor]:
    """Least seconds, and the sample."""
    seconds = float("inf")
    with torch.inference_mode():
        for _ in range(repeats):
            began = time.perf_counter()
            x = sample()
            if x.is_cuda:
                torch.cuda.synchronize()
            seconds = min(seconds, time.perf_counter() - began)
    return seconds, x


def error(x: Tensor, exact: Tensor) -> float:
    return float((x - exact).square().mean() / exact.square().mean())


def per_token(flow: STARFlow, jacobi: Jacobi) -> float:
    """Network evaluations a token in the last run."""
    tokens = flops.blocks(flow.config)[0].sequence * len(flow.blocks)
    return sum(count * window for count, window in jacobi.evaluations) / tokens


# How fast ---------------------------------------------------------------------------------------------------


def speed(flow: STARFlow, batches: list[int], device: str, repeats: int) -> Iterator[dict[str, Any]]:
    """Sequential and Jacobi decoding by batch, threads and tolerance."""
    most = torch.get_num_threads()
    tokens = flops.blocks(flow.config)[0].sequence * len(flow.blocks)
    for batch in batches:
        given, exact = inputs(flow.config, batch, device), torch.empty(0)
        for threads in [most] if device == "cuda" else sorted({1, most}):
            torch.set_num_threads(threads)
            for jacobi in (None, Jacobi(1e-2), Jacobi(1e-3), Jacobi(1e-4)):
                seconds, x = best(lambda given=given, jacobi=jacobi: draw(flow, given, jacobi), repeats)
                row: dict[str, Any] = {"decoder": "Jacobi" if jacobi else "sequential"}
                row |= {"images": batch, "threads": threads, "tolerance": jacobi.tolerance if jacobi else "exact"}
                row |= {"seconds": seconds, "seconds an image": seconds / batch}
                if jacobi is None:
                    exact = x
                    row["steps"] = tokens
                else:
                    row["steps"] = sum(count for count, _ in jacobi.evaluations)
                    row["evaluations"] = per_token(flow, jacobi)
                    row["error"] = error(x, exact)
                yield row
        torch.set_num_threads(most)


# What each means gains --------------------------------------------------------------------------------------


def without_cache(flow: STARFlow, given: Inputs) -> Tensor:
    """The network anew for each token, on all tokens before it, both rows in every block."""
    noise, text, null = given
    u, grid = flow.patchify(noise), flow.config.tokens(*noise.shape[2:])
    rotary, rows = flow.rotary(grid, u.device, u.dtype), torch.cat([text, null])
    prefix = rotary.shape[1] - u.shape[1]
    for k in reversed(range(len(flow.blocks))):
        block: Block = flow.blocks[k]  # type: ignore[assignment]
        z, u = in_order(k, u), torch.zeros_like(u)
        for i in range(z.shape[1]):
            before, table = u[:, : i + 1].repeat(2, 1, 1), rotary[:, : prefix + i + 1]
            gaussians = block.gaussians(before, rows, table, lambda layer, h, rotary: layer(h, rotary))
            sigma, mean = guide(*(part[:, -1] for part in gaussians), GUIDANCE)
            u[:, i] = z[:, i] * sigma + mean
        u = in_order(k, u)
    return flow.unpatchify(u, grid)


class TwoPasses:
    """In place of BlockDecoder: caption and null caption one after the other, in every block."""

    def __init__(self, block: Block, tokens: int, rotary: Tensor, text: Tensor, batch: int, guidance: float) -> None:
        self.block, self.rows = block, batch
        halves = text.chunk(2) if guidance else (text, text)
        self.passes = [BlockDecoder(block, tokens, rotary, half, batch, 0.0) for half in halves]

    def __call__(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        sigmas, means = zip(*(one(*arguments) for one in self.passes), strict=True)
        return guide(torch.cat(sigmas), torch.cat(means), GUIDANCE)


class GuidedEverywhere(BlockDecoder):
    """Both rows in every block, though shallow ones see no caption."""

    def __init__(
        self, block: Block, tokens: int, rotary: Tensor, text: Tensor | None, batch: int, guidance: float
    ) -> None:
        super().__init__(block, tokens, rotary, text, batch, GUIDANCE)


class WholeChunk(StoppingRule):
    """No token of a chunk leaves before all of them may."""

    def __call__(self, change: Tensor) -> int:
        change = change.cpu()
        released = super().__call__(change)
        if released == len(change):
            return released
        self.waiting = change
        return 0


def plain(layer: nn.Module) -> nn.Module:
    """In place of `pack`."""
    return layer


@contextmanager
def instead(replaced: dict[tuple[Any, str], Any]) -> Iterator[None]:
    """{(owner, name): stand-in} in force inside."""
    with ExitStack() as stack:
        for (owner, name), value in replaced.items():
            stack.enter_context(patch.object(owner, name, value))
        yield


def gains(flow: STARFlow, batches: list[int], device: str, repeats: int) -> Iterator[dict[str, Any]]:
    """Means by means; a GPU's list starts where a CPU's would take hours there."""
    two, everywhere = {(decoding, "BlockDecoder"): TwoPasses}, {(decoding, "BlockDecoder"): GuidedEverywhere}
    chunks, eager = {(decoding, "StoppingRule"): WholeChunk}, {(Steps, "FIXED"): ()}
    unpacked = {(decoding, "pack"): plain}
    lines: list[tuple[str, Jacobi | None, dict[tuple[Any, str], Any]]] = [
        ("key/value cache", None, two | unpacked | eager),
        ("packed weights (CPU)", None, two | eager),
        ("both guided rows in one batch", None, everywhere | eager),
        ("shallow blocks unguided", None, eager),
        ("CUDA graphs (GPU)", None, {}),
        ("Jacobi, chunks of 16, from the noise", Jacobi(1e-3, 16, guess_from=0), chunks),
        ("better starting values", Jacobi(1e-3, 16), chunks),
        ("early release", Jacobi(1e-3, 16), {}),
        ("window by block", Jacobi(1e-3), {}),
    ]
    for batch in batches:
        given = inputs(flow.config, batch, device)
        _, exact = best(lambda given=given: draw(flow, given, None), 1)
        last = None
        if device == "cpu":
            last, x = best(lambda given=given: without_cache(flow, given), 1)
            yield {"means": "no cache", "images": batch, "seconds": last, "times": 1.0, "error": error(x, exact)}
        for name, jacobi, replaced in lines:
            if f"({'CPU' if device == 'cuda' else 'GPU'})" in name:
                continue
            with instead(replaced):
                seconds, x = best(lambda given=given, jacobi=jacobi: draw(flow, given, jacobi), repeats)
            times = 1.0 if last is None else last / seconds
            row = {"means": name, "images": batch, "seconds": seconds, "times": times, "error": error(x, exact)}
            yield row | ({"evaluations": per_token(flow, jacobi)} if jacobi else {})
            last = seconds


# Windows ----------------------------------------------------------------------------------------------------


def windows(flow: STARFlow, batches: list[int], device: str, repeats: int) -> Iterator[dict[str, Any]]:
    """Least seconds of the deep block and of all shallow ones by window, at tolerance 1e-3."""
    tokens, decode_jacobi = flops.blocks(flow.config)[0].sequence, decoding.decode_jacobi
    spent: dict[bool, float] = {}

    def timed(decoder: BlockDecoder, *arguments: Any) -> tuple[Tensor, Tensor]:
        began = time.perf_counter()
        result = decode_jacobi(decoder, *arguments)
        spent[decoder.block.sees_text] = spent.get(decoder.block.sees_text, 0.0) + time.perf_counter() - began
        return result

    for batch in batches:
        given = inputs(flow.config, batch, device)
        chosen = [best_window(tokens, rows, device) for rows in (2 * batch, batch)]
        for window in sorted({8, 16, 24, 32, 48, 64, 96, 128, *chosen}):
            least = {True: float("inf"), False: float("inf")}
            with patch.object(decoding, "decode_jacobi", timed):
                for _ in range(repeats):
                    spent.clear()
                    best(lambda given=given, window=window: draw(flow, given, Jacobi(1e-3, window)), 1)
                    least = {kind: min(least[kind], spent[kind]) for kind in least}
            notes = [name for name, default in zip(("deep", "shallow"), chosen, strict=True) if default == window]
            row = {"images": batch, "window": window, "deep, s": least[True], "shallow, s": least[False]}
            yield row | {"default of": ", ".join(notes)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--tables", nargs="+", choices=list(TITLES), default=list(TITLES))
    parser.add_argument("--batches", type=int, nargs="+", help="images a batch (default 1 4 on a CPU, 8 on a GPU)")
    parser.add_argument(
        "--repeats", type=int, help="runs of each line; the best counts (default 3 on a CPU, 1 on a GPU)"
    )
    options = parser.parse_args()
    gpu = options.device == "cuda"
    config = PRESETS["t2i-256"] if gpu else SMALL
    flow = random_model(config, options.device)
    batches, repeats = options.batches or ([8] if gpu else [1, 4]), options.repeats or (1 if gpu else 3)
    measure = {"speed": speed, "gains": gains, "windows": windows}
    for table in options.tables:
        about = machine(options.device)
        about |= {"parameters": flops.parameters(config), "width": config.width, "layers": str(list(config.layers))}
        rows = list(measure[table](flow, batches, options.device, repeats))
        if gpu:
            about["peak GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        name = "sampling" if table == "speed" else f"sampling-{table}"
        write(f"{name}-{options.device}", TITLES[table], about, rows)


if __name__ == "__main__":
    main()
