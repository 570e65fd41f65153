"""How long a save stops training, to local disk and to S3: uploaded behind the training, against waiting for it.

    python benchmarks/checkpoint.py                                  # about four minutes on 2 cores
    python benchmarks/checkpoint.py --store s3://bucket/prefix       # an S3 store of your own

1.4 GB of state on two ranks; a row for a local folder, one for an S3 server on this machine, which shares its cores and
its disk. Writes benchmarks/results/checkpoint-cpu.{md,json}. Both ways of saving are measured in the same run, on the
same state. "stall": what the training loop waits for in `Saver.begin`, the slowest rank counts. "synchronous": the same
save, waited for until its manifest is committed. "behind": committed while training goes on, so many seconds after the
stall, as seen at the end of a step; step times tell what that costs the training. Others that use the memory make the
copy slower: see the load.
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
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from loader import s3_store
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
            "behind, s": median(behind),
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


def measure(store: str, folder: Path, arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """The row of a store, and the state that was saved."""
    config = TrainConfig.model_validate(
        {"store": store, "run": "benchmark-checkpoint", "preset": "tiny", "steps": 100, "ranks": arguments.ranks,
         "global_batch_size": arguments.ranks, "zero_stage": 2, "learning_rate": 1e-4, "keep_newest": 1,
         "cache": folder}
    )  # fmt: skip
    flow = FlowConfig(width=arguments.width, layers=(1, 6), grid=(8, 8))
    opened, out = open_store(store), folder / "result.json"
    Lease(opened, config.run, OWNER, seconds=3600).acquire()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(rank, (port, config, flow, arguments.repeats, out), nprocs=arguments.ranks)
    checkpoint = load_manifest(opened, config.run)
    opened.delete(info.key for info in list(opened.list(f"runs/{config.run}/")))
    size = sum(ref.size for ref in checkpoint.objects())
    state = {
        "state, bytes": size,
        "parameters": sum(torch.Size(shape).numel() for shape in checkpoint.parameters.values()),
    }
    row = json.loads(out.read_text())
    rates = {f"{way}, MB/s": size / 1e6 / row[f"{way}, s"] for way in ("synchronous", "behind")}
    return {"store": "S3" if "://" in store else "a local folder"} | row | rates, state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", help="an S3 store, instead of a local one started for this")
    parser.add_argument("--width", type=int, default=1024, help="model width (7 layers)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    about = machine("cpu")
    with tempfile.TemporaryDirectory(prefix="sfc-") as temporary:
        folder = Path(temporary)
        local, state = measure(str(folder / "store"), folder, arguments)
        with s3_store(folder / "stack", arguments.store) as url:
            remote, _ = measure(url, folder, arguments)
    about |= state | {"ranks": arguments.ranks, "saves of each kind": arguments.repeats}
    write("checkpoint-cpu", "What a checkpoint costs training", about, [local, remote])


if __name__ == "__main__":
    main()
