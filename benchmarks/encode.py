"""Encoding on Ray against the bare VAE on the same pictures already decoded in memory, with one worker and with two.

    python benchmarks/encode.py                      # both VAEs, a quarter of an hour on 2 cores
    python benchmarks/encode.py --vaes emoji

Each worker has one thread for its VAE. Bare: processes that do nothing but encode batches in memory. Encode: the real
thing on as many actors, from JPEG bytes in a store (twice the size of what is encoded) to committed shards, counted
from the end of the first shards to where no shard is left to be started. Both are measured in turn, three times: rates
are medians by wall clock, efficiencies those of the rounds' own ratios, with the least and the greatest. CPU
efficiency compares pictures per second of CPU time.
VAEs: the shipped one at 64 px, and one of Stable Diffusion's shape (34 M parameters in the encoder, random weights)
at 128 px.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import multiprocessing
import os
import shutil
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from train_step import machine, write

from pipelines.encode import encode
from pipelines.encode_plan import EncodeConfig
from starflow.encoders import load_vae, to_tensor
from starflow.images import decode_image, fit
from starflow.objectstore import ObjectStore, open_store

#: VAE: picture size, pictures of a shard, shards of an actor, pictures of a batch.
CASES = {"emoji": (64, 128, 16, 16), "SD-shaped": (128, 8, 12, 8)}
BARE_SECONDS = 10.0
ROUNDS = 3


def crawl(store: ObjectStore, count: int, size: int) -> str:
    """JPEG pictures of twice the final size in a tar, and the sample table over it."""
    random, samples, tar_bytes = np.random.default_rng(0), [], io.BytesIO()
    with tarfile.open(fileobj=tar_bytes, mode="w") as tar:
        for number in range(count):
            data = jpeg(random, 2 * size)
            info = tarfile.TarInfo(f"{number}.jpg")
            info.size = len(data)
            offset = tar.offset + tarfile.BLOCKSIZE
            tar.addfile(info, io.BytesIO(data))
            samples.append(
                {
                    "id": hashlib.sha256(data).hexdigest(),
                    "url": f"http://x/{number}",
                    "width": 2 * size,
                    "height": 2 * size,
                    "captions": [{"text": "x", "origin": "alt-text", "version": "1", "weight": 1.0}],
                    "image": {"key": "crawl/0.tar", "offset": offset, "size": info.size},
                }
            )
    store.write("crawl/0.tar", tar_bytes.getvalue())
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(samples), table)
    store.write("crawl/0.parquet", table.getvalue())
    return "crawl/0.parquet"


def jpeg(random: np.random.Generator, side: int) -> bytes:
    """Soft blobs with some grain: about as many bytes a pixel as a photograph."""
    coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).resize((side, side))
    pixels = np.asarray(coarse) + random.normal(0, 4, (side, side, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def save_sd_shaped(folder: Path) -> None:
    """An AutoencoderKL with the configuration of Stable Diffusion's and random weights."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    ).save_pretrained(folder)


def bare(vae: str, size: int, batch: int, barrier: Any, answers: Any) -> None:
    """Encodes batches in memory for `BARE_SECONDS` beside its peers; answers pictures, seconds, CPU seconds."""
    torch.set_num_threads(1)
    model, random = load_vae(vae), np.random.default_rng(0)
    pixels = np.stack([fit(decode_image(jpeg(random, 2 * size)), size, size) for _ in range(batch)])
    model.encode(to_tensor(pixels))
    barrier.wait()
    began, cpu, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began < BARE_SECONDS:
        [latents.half().numpy() for latents in model.encode(to_tensor(pixels))]
        count += batch
    answers.put((count, time.perf_counter() - began, time.process_time() - cpu))


def bare_rates(vae: str, size: int, batch: int, workers: int) -> tuple[float, float]:
    """Pictures per second of that many bare VAEs together, and per CPU second."""
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(workers), context.Queue()
    processes = [context.Process(target=bare, args=(vae, size, batch, barrier, answers)) for _ in range(workers)]
    for process in processes:
        process.start()
    found = [answers.get() for _ in processes]
    for process in processes:
        process.join()
    counts, cpu = sum(count for count, _, _ in found), sum(cpu for _, _, cpu in found)
    return sum(count / seconds for count, seconds, _ in found), counts / cpu


def encode_rates(folder: Path, config: EncodeConfig, shard: int, shards: int) -> tuple[float, float]:
    """Pictures per second of `encode` while all its actors are at work, and per CPU second of the actors."""
    store = open_store(str(folder))
    table = crawl(store, shard * shards * config.actors, config.image_size)
    moments: list[tuple[int, float, float]] = []

    def on_progress(done: int, total: int) -> None:
        actors = [p for p in psutil.Process().children(recursive=True) if "ShardEncoder" in p.name()]
        moments.append((done, time.perf_counter(), sum(sum(p.cpu_times()[:2]) for p in actors)))

    encode(store, [table], config, "work", on_progress)
    first, last = moments[2 * config.actors - 1], moments[-2 * config.actors - 1]
    pictures = shard * (last[0] - first[0])
    return pictures / (last[1] - first[1]), pictures / (last[2] - first[2])


def float16_error(vae: str, size: int) -> str:
    """What storing latents as float16 costs, beside the posterior's own standard deviation."""
    random = np.random.default_rng(1)
    pixels = np.stack([fit(decode_image(jpeg(random, 2 * size)), size, size) for _ in range(8)])
    model = load_vae(vae)
    mean, std = model.encode(to_tensor(pixels))
    error = (mean - mean.half().float()).abs()
    decoded = model.decode(mean) - model.decode(mean.half().float())
    return (
        f"mean off by {error.square().mean().sqrt():.1e} rms, {error.max():.1e} at most "
        f"({error.square().mean().sqrt() / mean.std():.1e} of the latents' standard deviation, "
        f"{error.square().mean().sqrt() / std.square().mean().sqrt():.1e} of the posterior's); "
        f"pictures by {127.5 * decoded.square().mean().sqrt():.1e} of 255 grey levels rms"
    )


def measure(name: str, folder: Path) -> list[dict[str, Any]]:
    """Two rows: bare and encode."""
    size, shard, shards, batch = CASES[name]
    vae = name
    if name != "emoji":
        vae = str(folder / "vae")
        save_sd_shaped(Path(vae))
    latent = load_vae(vae)
    row_bytes = 2 * latent.channels * (size // latent.downsampling) ** 2
    config = EncodeConfig(
        image_size=size, vae=vae, aspect_ratios=("1:1",), vae_batch=batch, shard_bytes=shard * row_bytes,
        chunk_bytes=shard * row_bytes,
    )  # fmt: skip
    alone, whole = np.empty((2, ROUNDS, 2)), np.empty((2, ROUNDS, 2))  # by worker count, round, kind of rate
    for turn in range(ROUNDS):
        for workers in (1, 2):
            there, actors = folder / f"{turn}-{workers}", config.model_copy(update={"actors": workers})
            alone[workers - 1, turn] = bare_rates(vae, size, batch, workers)
            whole[workers - 1, turn] = encode_rates(there, actors, shard, shards)
    rows = []
    for what, rates in (("bare VAE", alone), ("encode", whole)):
        one, two = rates[:, :, 0]
        about = {"VAE": f"{name} at {size} px", "": what}
        rates_by_count = {"1, pictures/s": np.median(one), "2, pictures/s": np.median(two)}
        rows.append(about | rates_by_count | {"2 by 1": spread(two / one)})
    for workers in (1, 2):
        wall, cpu = (whole[workers - 1] / alone[workers - 1]).T
        rows[1] |= {f"efficiency, {workers}": spread(wall), f"CPU efficiency, {workers}": spread(cpu)}
    return rows


def spread(rounds: np.ndarray) -> str:
    """The median, with the least and the greatest."""
    return f"{np.median(rounds):.2f} ({rounds.min():.2f} to {rounds.max():.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vaes", nargs="+", choices=list(CASES), default=list(CASES))
    arguments = parser.parse_args()
    about = machine("cpu") | {"cores": os.cpu_count()}
    rows, errors = [], {}
    for name in arguments.vaes:
        folder = Path(tempfile.mkdtemp(prefix="starflow-encode-"))
        try:
            rows += measure(name, folder)
            errors[f"float16, {name}"] = float16_error(name if name == "emoji" else str(folder / "vae"), CASES[name][0])
        finally:
            shutil.rmtree(folder)
    about["load at the end"] = f"{os.getloadavg()[0]:.2f}"
    write("encode", "Encode: whole shards on Ray against the bare VAE", about | errors, rows)


if __name__ == "__main__":
    main()
