"""Speed and error of sampling: sequential and Jacobi decoding, and what each part of the latter gains.

    python benchmarks/sampling.py                      # the CPU shape: 11.2 M parameters, guided, float32
    python benchmarks/sampling.py --device cuda        # the released 3.8 B shape, guided, bfloat16

Weights are drawn with a standard deviation of 0.05 (on a GPU scaled with the width), so that nothing converges by
accident. Errors are mean squared differences from the sequential answer, relative to its mean square; "evaluations"
are network evaluations a token, counting each token of each window.
"""

from __future__ import annotations

import argparse
import time
from typing import Any, NamedTuple

import torch
from train_step import SMALL, machine, write

from starflow import flops
from starflow.decoding import Jacobi, invert
from starflow.model import FlowConfig, STARFlow
from starflow.presets import PRESETS


class Case(NamedTuple):
    """One line of the table: images in a batch, threads, and how to decode (None: sequentially)."""

    name: str
    batch: int
    threads: int
    jacobi: Jacobi | None


def random_model(config: FlowConfig, device: str) -> STARFlow:
    torch.manual_seed(0)
    with torch.device(device):
        flow = STARFlow(config).eval()
    with torch.no_grad():
        for parameter in flow.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.05 * (256 / config.width) ** 0.5)
    return flow.bfloat16() if device == "cuda" else flow


def cases(batches: list[int], threads: list[int]) -> list[Case]:
    """Every line of the table."""
    found = []
    for batch in batches:
        found += [Case("sequential", batch, count, None) for count in threads]
        for count in threads:
            found.append(Case("Jacobi, window 16, from the noise", batch, count, Jacobi(1e-3, 16, guess_from=0)))
            for tolerance in (1e-2, 1e-3, 1e-4):
                found.append(Case("Jacobi, window 16", batch, count, Jacobi(tolerance, 16)))
            for window in (8, 32):
                found.append(Case(f"Jacobi, window {window}", batch, count, Jacobi(1e-3, window)))
    return found


def run(flow: STARFlow, case: Case, device: str, repeats: int) -> tuple[float, torch.Tensor]:
    """Best seconds and the sample."""
    config = flow.config
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(case.batch, config.channels, *config.grid, generator=generator).to(device)
    text = torch.randn(case.batch, config.text_length, config.text_width, generator=generator).to(device)
    null = torch.randn(1, config.text_length, config.text_width, generator=generator).expand_as(text).to(device)
    torch.set_num_threads(case.threads)
    best = float("inf")
    for _ in range(repeats):
        if case.jacobi is not None:
            case.jacobi.evaluations.clear()
        began = time.perf_counter()
        with torch.inference_mode():
            x = invert(flow, noise, text, null, 2.0, case.jacobi).x
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best, x


def row(flow: STARFlow, case: Case, seconds: float, x: torch.Tensor, exact: torch.Tensor | None) -> dict[str, Any]:
    """A line of the table."""
    result: dict[str, Any] = {
        "decoder": case.name,
        "images": case.batch,
        "threads": case.threads,
        "tolerance": case.jacobi.tolerance if case.jacobi else "exact",
        "seconds": seconds,
        "seconds an image": seconds / case.batch,
    }
    if case.jacobi is not None and exact is not None:
        height, width = flow.config.tokens(*flow.config.grid)
        steps = sum(case.jacobi.evaluations)
        result["steps"] = steps
        result["evaluations"] = steps * case.jacobi.window / (height * width * len(flow.blocks))
        result["error"] = float((x - exact).square().mean() / exact.square().mean())
    else:
        result["steps"] = len(flow.blocks) * flow.patchify(x).shape[1]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batches", type=int, nargs="+", help="images a batch (default 1 4 on a CPU, 8 on a GPU)")
    parser.add_argument("--repeats", type=int, help="runs of each line; the best counts")
    options = parser.parse_args()
    gpu = options.device == "cuda"
    config = PRESETS["t2i-256"] if gpu else SMALL
    flow = random_model(config, options.device)
    threads = [torch.get_num_threads()] if gpu else sorted({1, torch.get_num_threads()})
    about = machine(options.device)
    about |= {"parameters": flops.parameters(config), "width": config.width, "layers": str(list(config.layers))}
    rows, exact = [], {}
    for case in cases(options.batches or ([8] if gpu else [1, 4]), threads):
        seconds, x = run(flow, case, options.device, options.repeats or (1 if gpu else 3))
        if case.jacobi is None:
            exact[case.batch] = x
        rows.append(row(flow, case, seconds, x, exact[case.batch]))
    if gpu:
        about["peak GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    write(f"sampling-{options.device}", "Sampling, guided", about, rows)


if __name__ == "__main__":
    main()
