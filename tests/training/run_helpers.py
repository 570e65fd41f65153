"""Starting, watching and comparing runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from starflow.checkpoints import list_steps, load_manifest
from training.launch import read_heartbeats
from training.metrics import read_metrics

#: What differs between two runs of the same computation.
TIMING = {"seconds", "images_per_second", "data_wait", "text_seconds", "validation_seconds", "sample_seconds"}


def command(config, tmp_path, environment=None, name=None):
    """`starflow train` on the configuration, as a process of its own."""
    file = tmp_path / f"{name or config.run}.yaml"
    file.write_text(config.model_dump_json())  # JSON is YAML
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
    return subprocess.Popen([sys.executable, "-m", "starflow.cli", "train", "--config", str(file)], env=environment)


def train(config, tmp_path, seconds=200):
    process = command(config, tmp_path)
    try:
        return process.wait(timeout=seconds)
    finally:
        process.kill()


def until(condition, seconds=100):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.05)
    return found


def ranks_of(config):
    """Process ids by rank of the newest attempt."""
    attempts = sorted((config.folder / "attempts").glob("*"))
    return {rank: pid for rank, (pid, _) in read_heartbeats(attempts[-1]).items()} if attempts else {}


def tensors(store, run, step):
    """Checksums of everything that decides the future."""
    return [
        (shard.weights.sha256, shard.ema.sha256, shard.optimizer.sha256)
        for shard in load_manifest(store, run, step).shards
    ]


def lines(store, run):
    """The metrics without what the clock decides."""
    found = read_metrics(store.read(f"runs/{run}/metrics.jsonl"))
    return [{key: value for key, value in line.items() if key not in TIMING} for line in found]


def kill_a_rank(config, store, process, rank=1, after=2):
    """SIGKILLs a rank once `after` steps are committed."""
    until(lambda: any(step >= after for step in list_steps(store, config.run)))
    os.kill(ranks_of(config)[rank], signal.SIGKILL)
    assert process.wait(timeout=200) == 0
