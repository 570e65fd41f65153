"""Seconds from `starflow launch --on local` to the first step, on a warm machine: the tiny preset, two ranks.

Writes benchmarks/results/launch-cpu.{json,md}. The first launch warms the page cache and is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from infra.launch import newest, stop
from starflow.encoders import VAEIdentity
from starflow.objectstore import open_store
from starflow.parts import part_from_arrays
from starflow.snapshots import publish

sys.path.insert(0, str(Path(__file__).parent))
from train_step import write

#: Stages of the start, and the file in the run's folder that shows each.
STAGES = {"supervisor and torchrun": "attempts/*/attempt.json", "ranks": "attempts/*/heartbeat-0.json"}


def publish_noise(store: str) -> None:
    """A snapshot of 64 random latents without text."""
    random = np.random.default_rng(0)
    mean = random.normal(size=(64, 4, 8, 8)).astype(np.float16)
    vae = VAEIdentity(name="none", sha256="0" * 64, scaling_factor=1.0, channels=4, downsampling=2)
    table = pa.table({"id": [f"{row:064x}" for row in range(64)], "url": [f"http://x/{row}" for row in range(64)]})
    opened = open_store(store)
    part = part_from_arrays(opened, vae, mean, np.full_like(mean, 0.05), table, [], [])
    publish(opened, parent=None, parts=[part], image_size=16)


def launch_once(folder: Path, run: str) -> dict[str, float]:
    """Seconds from the command's start until the shell has its prompt back, and until each stage's file is there."""
    settings = {
        "store": str(folder / "store"), "run": run, "preset": "tiny", "text_encoder": None, "steps": 100_000,
        "global_batch_size": 8, "held_out": 0.0, "cache": str(folder / "cache"),
        "model": {"text_length": 0, "text_width": 0},
    }  # fmt: skip
    file = folder / f"{run}.yaml"
    file.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "starflow.cli", "launch", "--on", "local", "--ranks-per-node", "2"]
    began = time.perf_counter()
    subprocess.run([*command, "--config", str(file)], check=True, capture_output=True)
    seconds = {"launch returns": time.perf_counter() - began}
    here = folder / "cache" / "runs" / run
    try:
        for stage, pattern in STAGES.items():
            seconds[stage] = _wait(lambda pattern=pattern: any(here.glob(pattern)), began)
        metrics = here / "metrics.jsonl"
        seconds["first step"] = _wait(lambda: metrics.exists() and metrics.stat().st_size > 0, began)
    finally:
        stop(newest(settings["store"], run), 0.0)
    return seconds


def _wait(condition: Any, began: float) -> float:
    while not condition():
        if time.perf_counter() - began > 300:
            raise TimeoutError("no first step within 300 s; see the logs in the folder")
        time.sleep(0.02)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=3, help="launches that count")
    times = parser.parse_args().times
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = name
        publish_noise(str(folder / "store"))
        load = os.getloadavg()[0]
        launches = [launch_once(folder, f"run-{number}") for number in range(times + 1)][1:]
    rows = [
        {"until": stage, "min s": min(found), "median s": statistics.median(found), "max s": max(found)}
        for stage in launches[0]
        if (found := [launch[stage] for launch in launches])
    ]
    about = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "load before": round(load, 2),
        "launches": times,
    }
    write("launch-cpu", "From `starflow launch --on local` to the first step, warm, two CPU ranks", about, rows)


if __name__ == "__main__":
    main()
