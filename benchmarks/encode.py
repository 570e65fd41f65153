"""Encoding against the bare VAE on the same pictures already decoded in memory, and two actors against one.

    python benchmarks/encode.py --pictures 2000 --image-size 64

Efficiency is the time that the bare VAE needs for a shard's pixels over the time that a whole shard takes in one
actor (fetch, decode, resize, VAE, write), measured in turns in one process with one torch thread. Scaling is over
`encode` with one and two Ray actors, counted from the first finished shard so that starting Ray is left out.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import shutil
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.encode import encode
from pipelines.encode_plan import EncodeConfig, make_plan
from pipelines.encode_shard import CPU_BATCH, ShardEncoder
from starflow.encoders import load_vae, to_tensor
from starflow.objectstore import ObjectStore, open_store
from starflow.takedowns import Takedowns


def crawl(store: ObjectStore, count: int, size: int) -> str:
    """JPEG pictures of twice the final size in a tar, and the sample table over it."""
    random, samples, tar_bytes = np.random.default_rng(0), [], io.BytesIO()
    with tarfile.open(fileobj=tar_bytes, mode="w") as tar:
        for number in range(count):
            buffer = io.BytesIO()
            coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8))
            coarse.resize((2 * size, 2 * size)).save(buffer, "JPEG", quality=90)
            info = tarfile.TarInfo(f"{number}.jpg")
            info.size = buffer.tell()
            offset = tar.offset + tarfile.BLOCKSIZE
            tar.addfile(info, io.BytesIO(buffer.getvalue()))
            samples.append(
                {
                    "id": hashlib.sha256(str(number).encode()).hexdigest(),
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


def efficiency(folder: Path, config: EncodeConfig, count: int) -> tuple[float, float]:
    """Pictures per second of the bare VAE and of whole shards, in turns."""
    store = open_store(str(folder))
    table = crawl(store, count, config.image_size)
    encoder, vae = ShardEncoder(store.url, config, "work"), load_vae(config.vae)
    plan = make_plan(store, "work", [table], config, encoder.models(), Takedowns())
    (part,) = plan.parts
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (CPU_BATCH, config.image_size, config.image_size, 3), np.uint8)
    vae.encode(to_tensor(pixels))
    bare = whole = 0.0
    for index in range(part.plan.shards):
        started = time.process_time()
        for _ in range(part.plan.shard_rows(index) // CPU_BATCH):
            [latents.half().numpy() for latents in vae.encode(to_tensor(pixels))]
        bare += time.process_time() - started
        started = time.process_time()
        encoder.encode(part, index)
        whole += time.process_time() - started
    return count / bare, count / whole


def actors(folder: Path, config: EncodeConfig, count: int) -> float:
    """Pictures per second of `encode`, from the first finished shard on."""
    store = open_store(str(folder))
    table = crawl(store, count, config.image_size)
    moments: list[tuple[float, int, int]] = []
    encode(store, [table], config, "work", lambda done, total: moments.append((time.perf_counter(), done, total)))
    first, last = moments[0], moments[-1]
    return count * (last[1] - first[1]) / last[2] / (last[0] - first[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=2048)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--vae", default="emoji")
    arguments = parser.parse_args()
    config = EncodeConfig(image_size=arguments.image_size, vae=arguments.vae, actors=1, aspect_ratios=("1:1",))
    folder = Path(tempfile.mkdtemp(prefix="starflow-encode-"))
    try:
        bare, whole = efficiency(folder / "one", config, arguments.pictures)
        one = actors(folder / "a1", config, arguments.pictures)
        two = actors(folder / "a2", config.model_copy(update={"actors": 2}), arguments.pictures)
    finally:
        shutil.rmtree(folder)
    print(
        f"{arguments.pictures:,} JPEG pictures of {2 * arguments.image_size} px to {arguments.image_size} px, ", end=""
    )
    print(f"VAE {arguments.vae}; {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}.\n")
    print("| | pictures/s | ratio |\n|---|---:|---:|")
    print(f"| bare VAE, pixels in memory (per CPU second) | {bare:,.0f} | 1 |")
    print(f"| whole shards (per CPU second) | {whole:,.0f} | {whole / bare:.2f} |")
    print(f"| encode, 1 actor | {one:,.0f} | 1 |")
    print(f"| encode, 2 actors | {two:,.0f} | {two / one:.2f} |")


if __name__ == "__main__":
    main()
