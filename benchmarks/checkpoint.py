"""How long a save stops training: copied to memory and uploaded behind, against waiting for it.

    python benchmarks/checkpoint.py                      # 1.4 GB of state, two ranks, a local folder
    python benchmarks/checkpoint.py --store s3://bucket/prefix      # and against S3

Writes benchmarks/results/checkpoint-cpu.{md,json} (checkpoint-s3 for S3). Both paths run in the same run, on the
same state, against the same store. "stall": what the training loop waits for in `Saver.begin`, the slowest rank
counts. "synchronous": the same save, waited for until its manifest is committed. Step times tell what an upload
costs the training that goes on meanwhile. The load is noted: others that use the memory make the copy slower.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from train_step import machine, write

from starflow.checkpoints import Progress, TrainedInfo, load_manifest
from starflow.encoders import VAEIdentity
from starflow.model import FlowConfig, STARFlow
from starflow.objectstore import open_store
from training.checkpoint import Saver
from training.config import TrainConfig
from training.ema import EMA
from training.engine import Engine
from training.lease import Lease

OWNER = "benchmark:1:1"
VAE = VAEIdentity(name="none", sha256="0" * 64, scaling_factor=1.0, channels=4, downsampling=8)


def rank(number: int, port: int, config: TrainConfig, flow: FlowConfig, repeats: int, out: Path) -> None:
    """One rank; the first writes the result to `out`."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // config.ranks))
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(config.ranks)}
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=config.ranks)
    torch.manual_seed(0)
    engine = Engine(STARFlow(flow), config)
    saver = Saver(config, config.store, engine, EMA(engine.fragments), OWNER)
    out.with_suffix(".metrics").touch()
    alone, during, stalls, synchronous, behind = [], [], [], [], []
    timed_step(engine, config)  # warm-up
    for repeat in range(repeats):
        alone += [timed_step(engine, config) for _ in range(3)]
        stalls.append(begin(saver, engine, 2 * repeat + 1, config, out))
        began = time.perf_counter()
        while agreed(saver.busy):
            during.append(timed_step(engine, config))
        behind.append(time.perf_counter() - began)
        dist.barrier()
        began = time.perf_counter()
        begin(saver, engine, 2 * repeat + 2, config, out)
        saver.wait(lambda: None)
        dist.barrier()
        synchronous.append(time.perf_counter() - began)
        assert saver.error == "", saver.error
    saver.close()
    if number == 0:
        result = {
            "stall, s": median(stalls),
            "longest stall, s": max(stalls),
            "synchronous, s": median(synchronous),
            "longest stall, % of synchronous": 100 * max(stalls) / median(synchronous),
            "committed behind after, s": median(behind),
            "step alone, s": median(alone),
            "step during upload, s": median(during) if during else "none",
        }
        out.write_text(json.dumps(result))
    dist.destroy_process_group()


def begin(saver: Saver, engine: Engine, step: int, config: TrainConfig, out: Path) -> float:
    """Starts a save; seconds until the slowest rank may train on."""
    trained = TrainedInfo(
        run=config.run,
        step=step,
        samples=0,
        snapshot="none",
        vae=VAE,
        text_encoder=None,
        latent_noise=0.0,
        held_out=0.0,
    )
    dist.barrier()
    began = time.perf_counter()
    saver.begin(trained, Progress(samples=0, optimizer_steps=engine.optimizer_steps), out.with_suffix(".metrics"))
    seconds = torch.tensor(time.perf_counter() - began)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


def agreed(busy: bool) -> bool:
    flag = torch.tensor(float(busy))
    dist.all_reduce(flag)
    return bool(flag)


def timed_step(engine: Engine, config: TrainConfig) -> float:
    began = time.perf_counter()
    engine.backward([(torch.randn(config.per_rank, 4, 8, 8), None)])
    engine.step(1e-4)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", help="object store; a temporary folder if left out")
    parser.add_argument("--width", type=int, default=1024, help="model width (7 layers)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = arguments.store or str(Path(folder) / "store")
        config = TrainConfig.model_validate(
            {"store": store, "run": "benchmark-checkpoint", "preset": "tiny", "steps": 100, "ranks": arguments.ranks,
             "global_batch_size": arguments.ranks, "zero_stage": 2, "learning_rate": 1e-4, "keep_newest": 1,
             "cache": folder}
        )  # fmt: skip
        flow = FlowConfig(width=arguments.width, layers=(1, 6), grid=(8, 8))
        opened = open_store(store)
        Lease(opened, config.run, OWNER, seconds=3600).acquire()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        out = Path(folder) / "result.json"
        mp.spawn(rank, (port, config, flow, arguments.repeats, out), nprocs=arguments.ranks)
        checkpoint = load_manifest(opened, config.run)
        about = machine("cpu") | {
            "state, bytes": sum(ref.size for ref in checkpoint.objects()),
            "parameters": sum(torch.Size(shape).numel() for shape in checkpoint.parameters.values()),
            "ranks": arguments.ranks,
            "store": "S3" if "://" in store else "a local folder",
            "saves of each kind": arguments.repeats,
        }
        rows = [json.loads(out.read_text())]
        opened.delete(info.key for info in list(opened.list(f"runs/{config.run}/")))
    write("checkpoint-s3" if "://" in store else "checkpoint-cpu", "What a checkpoint costs training", about, rows)


if __name__ == "__main__":
    main()
