"""Which runs and checkpoints a store has, and their export."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from starflow import manifest
from starflow.checkpoints import list_runs, load_manifest, parse_checkpoint
from starflow.errors import ConfigError, NotFoundError
from starflow.objectstore import open_store


def test_runs_are_folders_with_a_run_json(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    for key in ("runs/b/run.json", "runs/a/run.json", "runs/x/lease.json", "runs/y/sub/run.json", "runs/run.json"):
        store.write(key, b"{}")
    assert list_runs(store) == ["a", "b"]


def test_an_unknown_checkpoint_names_what_there_is(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with pytest.raises(ConfigError, match=r"s3://bucket' is neither STORE/RUN"):
        parse_checkpoint("s3://bucket")
    with pytest.raises(NotFoundError, match=r"holds no runs.*STORE/RUN@STEP"):
        load_manifest(store, "a")
    store.write("runs/b/run.json", b"{}")
    with pytest.raises(NotFoundError, match=r"choose one of its runs: b$"):
        load_manifest(store, "a", 3)
    with pytest.raises(NotFoundError, match=r"'b' .* no committed checkpoint yet"):
        load_manifest(store, "b")
    store.write("runs/b/checkpoints/000000002.json", b"{}")
    with pytest.raises(NotFoundError, match=r"checkpoint 3 of run 'b' .* committed steps: 2"):
        load_manifest(store, "b", 3)


EXPORT = """
import sys, threading, time
from pathlib import Path
import torch  # what writes the file counts, not its libraries
from starflow.checkpoints import export, load_manifest
from starflow.convert import write_safetensors
from starflow.objectstore import open_store

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024

store = open_store(sys.argv[1])
checkpoint = load_manifest(store, "big")
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
export(store, checkpoint, Path(sys.argv[2]))
done.set()
thread.join()
print(peak - before)
"""


def test_export_needs_the_memory_of_a_few_parameters_only(tmp_path: Path) -> None:
    """Two ranks' shards, 128 MB together: what the process holds beyond mapped files stays far below that."""
    store = open_store(str(tmp_path / "store"))
    side, count = 1024, 32
    whole = {f"layer.{n}": torch.full((side, side), float(n)) for n in range(count)}
    half = side * side // 2
    shards = []
    for rank in range(2):
        parts = {f"{name}@{rank * half}": t.view(-1)[rank * half : (rank + 1) * half] for name, t in whole.items()}
        ref = manifest.put(store, f"runs/big/shards/{rank}", save(parts)).model_dump()
        shards.append({"weights": ref, "ema": ref, "optimizer": ref})
    vae = {"name": "v", "sha256": "0" * 64, "scaling_factor": 1.0, "channels": 4, "downsampling": 2}
    trained = {
        "run": "big", "step": 1, "samples": 1, "snapshot": "s", "vae": vae, "text_encoder": None, "latent_noise": 0.1,
        "held_out": 0.0,
    }  # fmt: skip
    body = {
        "run": "big", "step": 1, "created": "", "code": "", "ranks": 2, "zero_stage": 2, "shards": shards,
        "parameters": {name: [side, side] for name in whole}, "model": {}, "trained": trained,
        "progress": {"samples": 1, "optimizer_steps": 1}, "config": {}, "metrics": shards[0]["ema"],
    }  # fmt: skip
    manifest.commit(store, "runs/big/checkpoints/000000001.json", "checkpoint", 1, body)
    command = [sys.executable, "-c", EXPORT, store.url, str(tmp_path / "out")]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True, timeout=200).stdout)
    assert grown < 80e6
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(exported[name], whole[name]) for name in whole)
