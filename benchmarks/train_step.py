"""Speed of one training step: images/s, achieved FLOP/s, share of peak, memory; eager and compiled.

    python benchmarks/train_step.py                                  # the CPU shape: 11.2 M parameters, batch 8
    python benchmarks/train_step.py --device cuda                    # the released 3.8 B shape
    python benchmarks/train_step.py --preset emoji --batch 64 --modes eager

A step is forward, backward and fused AdamW: bfloat16 autocast over float32 weights on the CPU, bfloat16 weights and
optimizer states on a GPU. FLOPs count attention causally and no recomputation. The modes alternate within one run
and the best step of each counts.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from starflow import __version__, flops
from starflow.model import FlowConfig, STARFlow
from starflow.presets import PRESETS

RESULTS = Path(__file__).parent / "results"
SMALL = FlowConfig(256, (2, 2, 2, 8), grid=(16, 16), text_length=16, text_width=384)
#: Dense bfloat16 TFLOP/s that matrix products reach in practice, by a part of the device's name.
PEAKS = {"H200": 790.0, "H100": 790.0, "A100": 312.0}


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "starflow": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": gpu or f"{processor()}, {torch.get_num_threads()} threads",
        "load": Path("/proc/loadavg").read_text().split()[0] if Path("/proc/loadavg").exists() else "unknown",
    }


def processor() -> str:
    """The CPU's own name for itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write(name: str, title: str, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Prints the table and writes it as JSON and Markdown to `benchmarks/results/`."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"# {title}", "", *(f"- {key}: {value}" for key, value in about.items()), ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(column, "")) for column in columns) + " |" for row in rows]
    text = "\n".join(lines) + "\n"
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)


def cell(value: Any) -> str:
    """A table cell: three significant digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def make_step(config: FlowConfig, mode: str, batch: int, device: str, checkpointing: str) -> Callable[[], None]:
    """One training step of a fresh model, forward to optimizer."""
    torch.manual_seed(0)
    with torch.device(device):
        flow = STARFlow(config).train()
        x = torch.randn(batch, config.channels, *config.grid)
        text = torch.randn(batch, config.text_length, config.text_width) if config.text_length else None
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=device == "cpu")
    if device == "cuda":
        flow, text = flow.bfloat16(), None if text is None else text.bfloat16()
    flow.checkpointing = checkpointing  # type: ignore[assignment]
    if mode == "compiled":
        flow.compile_layers()
    optimizer = torch.optim.AdamW(flow.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)

    def step() -> None:
        with autocast:
            loss = flow(x, text).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def timed(step: Callable[[], None]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def measure(config: FlowConfig, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a mode; on a GPU one model at a time is in memory, on a CPU they alternate."""
    rows = {}
    groups = [[mode] for mode in options.modes] if options.device == "cuda" else [options.modes]
    for group in groups:
        if options.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        steps = {mode: make_step(config, mode, options.batch, options.device, options.checkpointing) for mode in group}
        first = {mode: timed(step) for mode, step in steps.items()}
        best = dict.fromkeys(group, float("inf"))
        for _ in range(options.steps):
            for mode, step in steps.items():
                best[mode] = min(best[mode], timed(step))
        for mode in group:
            rows[mode] = row(config, options, mode, best[mode], first[mode])
    return list(rows.values())


def row(config: FlowConfig, options: argparse.Namespace, mode: str, seconds: float, first: float) -> dict[str, Any]:
    """A line of the table."""
    rate = options.batch * flops.training_flops(config) / seconds
    result = {
        "mode": mode,
        "seconds a step": seconds,
        "images/s": options.batch / seconds,
        "TFLOP/s": rate / 1e12,
        "first step, s": first,
    }
    if options.device == "cuda":
        name = torch.cuda.get_device_name()
        peak = next((value for key, value in PEAKS.items() if key in name), None)
        result["% of peak"] = 100 * rate / 1e12 / peak if peak else "unknown"
        result["GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--preset", choices=list(PRESETS), help="instead of the default shape of the device")
    parser.add_argument("--batch", type=int, help="images a step (default 8 on a CPU, 16 on a GPU)")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    parser.add_argument("--checkpointing", choices=["none", "selective", "full"], default="none")
    options = parser.parse_args()
    options.batch = options.batch or (16 if options.device == "cuda" else 8)
    config = PRESETS[options.preset] if options.preset else (PRESETS["t2i-256"] if options.device == "cuda" else SMALL)
    about = machine(options.device)
    about |= {"parameters": flops.parameters(config), "width": config.width, "layers": str(list(config.layers))}
    about |= {"batch": options.batch, "checkpointing": options.checkpointing}
    suffix = f"-{options.preset}" if options.preset else ""
    write(f"train_step-{options.device}{suffix}", "Training step", about, measure(config, options))


if __name__ == "__main__":
    main()
