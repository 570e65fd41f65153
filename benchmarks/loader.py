"""Samples per second of the latent loader, next to WebDataset and MosaicML streaming on the same data.

    python benchmarks/loader.py                                     # under four minutes on 2 cores
    python benchmarks/loader.py --store s3://BUCKET/PREFIX          # an S3 store of your own, which must be empty

Each sample is a posterior mean and standard deviation (4 x 32 x 40 float16 each, 20 KB) and a caption. All readers
yield batches of 256 as arrays, shuffled as each does it, from a warm page cache; ours also from a local S3 server
with a cold and a warm cache on disk. Then a snapshot of 100,000 shards, and one of 300 small parts, are opened, and
the quality of shuffling is measured. Rows of readers that are not installed are left out. MosaicML streaming asks for
other versions of numpy and transformers than we have; beside them, in a folder of its own, it runs as it is:

    pip install --target ~/mds --no-deps mosaicml-streaming==0.13.0 torchvision==0.15.2 \\
        Brotli catalogue cramjam python-snappy xxhash zstd
    PYTHONPATH=~/mds python benchmarks/loader.py

(this torchvision, which it imports for pictures only, can be imported without its compiled part).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa

from infra.stack import LocalStack
from starflow import manifest
from starflow.compaction import compact
from starflow.encoders import VAEIdentity
from starflow.objectstore import ObjectStore, open_store
from starflow.parts import LayerPlan, part_from_arrays, plan_part
from starflow.reader import SnapshotReader
from starflow.shardindex import ShardRef, shard_key, write_index
from starflow.snapshots import Part, Snapshot, load_snapshot, publish
from training.loader import Loader
from training.order import BatchOrder

SHAPE, BATCH = (4, 32, 40), 256
SAMPLE_BYTES = 2 * 2 * int(np.prod(SHAPE))
#: (block, window) with a cold cache: whole shards, a few at a time.
COLD_ORDER = (2048, 4)
VAE = VAEIdentity(name="random", sha256="0" * 64, scaling_factor=1.0, channels=4, downsampling=8)


def make_samples(count: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Mean, std (count, *SHAPE) float16, captions."""
    random = np.random.default_rng(0)
    mean, std = (random.standard_normal((count, *SHAPE), np.float32).astype(np.float16) for _ in range(2))
    return mean, std, [f"a picture of number {number} among the others" for number in range(count)]


def write_snapshot(store: ObjectStore, mean: np.ndarray, std: np.ndarray, captions: list[str]) -> Snapshot:
    samples = pa.table({"id": [f"{n:064x}" for n in range(len(mean))], "url": captions})
    layer = LayerPlan(origin="alt-text", version="1")
    part = part_from_arrays(store, VAE, mean, std, samples, [(layer, captions)], shard_bytes=2**26)
    return publish(store, parent=None, parts=[part], image_size=256)


def rate(batches: Iterator[int], total: int) -> float:
    """Samples per second over `total` samples; the first batch, which includes opening, is not counted."""
    seen = next(batches)
    started, first = time.perf_counter(), seen
    for size in batches:
        seen += size
        if seen >= total:
            break
    return (seen - first) / (time.perf_counter() - started)


def opened(store_url: str, cache: Path, block: int, window: int) -> tuple[SnapshotReader, BatchOrder]:
    """What the training loader reads, and in which order; no shard has been asked for."""
    store = open_store(store_url)
    reader = SnapshotReader(store, load_snapshot(store), cache)
    return reader, BatchOrder(reader.counts, seed=0, global_batch_size=BATCH, block=block, window=window)


def ours(store_url: str, cache: Path, total: int, block: int, window: int) -> float:
    """The training loader: shuffled order, caption drawing, prefetch thread."""
    with Loader(*opened(store_url, cache, block, window), 0, 1, stop=total // BATCH) as loader:
        return rate((len(batch.mean) for _, batch in loader), total)


def ours_cold(store_url: str, cache: Path, total: int, block: int, window: int) -> tuple[float, float]:
    """Samples per second with nothing in the cache: all downloads counted, and opening the snapshot, too."""
    importlib.import_module("boto3")  # like every other module, before the clock starts
    started = time.perf_counter()
    reader, order = opened(store_url, cache, block, window)
    ready = time.perf_counter()
    with Loader(reader, order, 0, 1, stop=total // BATCH) as loader:
        count = sum(len(batch.mean) for _, batch in loader)
    ended = time.perf_counter()
    return count / (ended - ready), count / (ended - started)


def webdataset(folder: Path, workers: int, total: int) -> float:
    import webdataset as wds

    urls = sorted(str(path) for path in folder.glob("*.tar"))
    data = (
        wds.WebDataset(urls, shardshuffle=100, empty_check=False)
        .shuffle(1000)
        .decode()
        .to_tuple("mean.npy", "std.npy", "txt")
        .batched(BATCH)
    )
    loader = wds.WebLoader(data, num_workers=workers, batch_size=None)
    return rate((len(batch[0]) for batch in loader), total)


def write_webdataset(folder: Path, mean: np.ndarray, std: np.ndarray, captions: list[str]) -> None:
    import webdataset as wds

    with wds.ShardWriter(f"{folder}/%06d.tar", maxcount=3000, verbose=0) as sink:
        for number, caption in enumerate(captions):
            sink.write({"__key__": f"{number:08d}", "mean.npy": mean[number], "std.npy": std[number], "txt": caption})


def mosaic(folder: Path, workers: int, total: int) -> float:
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    data = StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)
    loader = DataLoader(data, batch_size=BATCH, num_workers=workers)
    return rate((len(batch["mean"]) for batch in loader), total)


def write_mosaic(folder: Path, mean: np.ndarray, std: np.ndarray, captions: list[str]) -> None:
    from streaming import MDSWriter

    shape = ",".join(map(str, SHAPE))
    columns = {"mean": f"ndarray:float16:{shape}", "std": f"ndarray:float16:{shape}", "txt": "str"}
    with MDSWriter(out=str(folder), columns=columns) as sink:
        for number, caption in enumerate(captions):
            sink.write({"mean": mean[number], "std": std[number], "txt": caption})


def many_shards(folder: Path, shards: int = 100_000, parts: int = 400) -> tuple[float, float]:
    """Seconds and peak MB (of a fresh process, imports included) to open a snapshot of that many shards."""
    store = open_store(str(folder))
    random, each, published = np.random.default_rng(0), shards // parts, []
    candidates = [tuple((row, int(random.integers(2**13))) for row in range(0, 4096, 8)) for _ in range(each)]
    for number in range(parts):
        plan = plan_part(str(number), (32, 32), each * 4096, VAE, shard_bytes=2**25)
        refs = [_fake_shard(plan.id, k, candidates[k]) for k in range(each)]
        for ref in (ref for shard in refs for ref in shard.objects.values()):
            (folder / ref.key).parent.mkdir(parents=True)  # empty: they are listed when published, and never read
            (folder / ref.key).touch()
        index = manifest.put(store, f"parts/{plan.id}/index.parquet", write_index(refs))
        published.append(
            Part(
                id=plan.id,
                grid=plan.grid,
                rows=plan.rows,
                count=plan.rows,
                chunk=plan.chunk,
                shard=plan.shard,
                arrays=plan.arrays,
                vae=VAE,
                index=index,
                samples=index,
            )
        )
    publish(store, parent=None, parts=published, image_size=256)
    return in_process(_open, str(folder))


def many_parts(folder: Path, parts: int = 300, each: int = 64) -> tuple[float, float, float]:
    """Seconds to open a snapshot of many nights' small parts; samples per second out of it, and once compacted."""
    store, random = open_store(str(folder)), np.random.default_rng(0)
    published = []
    for number in range(parts):
        mean = random.standard_normal((each, *SHAPE), np.float32).astype(np.float16)
        names = [f"{number}-{row}" for row in range(each)]
        samples = pa.table({"id": [f"{number * each + row:064x}" for row in range(each)], "url": names})
        layer = LayerPlan(origin="alt-text", version="1")
        published.append(part_from_arrays(store, VAE, mean, mean, samples, [(layer, names)]))
    publish(store, parent=None, parts=published, image_size=256)
    seconds, _ = in_process(_open, str(folder))
    before = _small_rate(folder, parts * each)
    compact(store)
    return seconds, before, _small_rate(folder, parts * each)


def _small_rate(folder: Path, total: int) -> float:
    in_process(ours, str(folder), folder / "cache", total, 256, 64)  # captions are made ready for mapping once
    return in_process(ours, str(folder), folder / "cache", 2 * total, 256, 64)


def _fake_shard(part: str, shard: int, candidates: tuple[tuple[int, int], ...]) -> ShardRef:
    objects = {
        name: manifest.ObjectRef(key=shard_key(part, name, shard, 4), size=2**25, sha256="ab" * 32)
        for name in ("mean", "std")
    }
    return ShardRef(index=shard, rows=4096, objects=objects, candidates=candidates)


def _open(folder: str) -> tuple[float, float]:
    started = time.perf_counter()
    store = open_store(folder)
    SnapshotReader(store, load_snapshot(store), Path(folder) / "cache", held_out=1e-4)
    seconds = time.perf_counter() - started
    status = Path("/proc/self/status").read_text()  # getrusage would include the peak of the parent process
    return seconds, int(status.partition("VmHWM:")[2].split()[0]) / 1024


def in_process(function: Callable[..., object], *arguments: object) -> object:
    """Runs in a fresh process, so that no reader inherits another's threads, files or memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def shuffling(block: int, window: int, count: int = 500_000) -> dict[str, object]:
    """How well one epoch of the order shuffles `count` samples, and that it visits each once."""
    grid = (32, 40)
    order = BatchOrder({grid: count}, seed=0, global_batch_size=BATCH, block=block, window=window)
    stream = order.positions(grid, 0, count)
    once = np.bincount(stream, minlength=count) == 1
    batches = stream[: count // BATCH * BATCH].reshape(-1, BATCH)
    spread = np.mean([len(np.unique(batch // block)) for batch in batches[::16]])
    return {
        "order": f"blocks of {block}, window {window}",
        "neighbour correlation": float(np.corrcoef(stream[:-1], stream[1:])[0, 1]),
        "seen exactly once, %": 100 * float(once.mean()),
        f"blocks in a batch of {BATCH}": float(spread),
    }


@contextmanager
def s3_store(folder: Path, url: str | None) -> Iterator[str]:
    """The S3 store to measure from: `url`, or one on a local stack that runs for as long."""
    if url:
        yield url
        return
    with LocalStack(folder) as stack:
        os.environ.update(stack.state.env)
        yield f"{stack.state.store}/loader"


def rates(folder: Path, data: tuple[np.ndarray, np.ndarray, list[str]], store: str | None) -> list[dict[str, object]]:
    """A row a reader."""
    count, found = len(data[0]), []
    write_snapshot(open_store(str(folder / "ours")), *data)
    local = (str(folder / "ours"), folder / "cache", 4 * count)
    found.append(("STARFlow, blocks of 256", in_process(ours, *local, 256, 64)))
    found.append(("STARFlow, every sample at random", in_process(ours, *local, 1, 2**30)))
    with s3_store(folder / "stack", store) as url:
        write_snapshot(open_store(url), *data)
        remote = (url, folder / "s3-cache", count, *COLD_ORDER)
        downloading, opening = in_process(ours_cold, *remote)
        found.append(("STARFlow, S3, cold cache", downloading))
        found.append(("STARFlow, S3, cold cache, opening included", opening))
        found.append(("STARFlow, S3, warm cache", in_process(ours, *remote)))
    for name, write_samples, read in (
        ("webdataset", write_webdataset, webdataset),
        ("streaming", write_mosaic, mosaic),
    ):
        if importlib.util.find_spec(name) is None:
            continue
        (folder / name).mkdir()
        write_samples(folder / name, *data)
        version = importlib.metadata.version({"streaming": "mosaicml-streaming"}.get(name, name))
        found += [
            (f"{name} {version}, {n} workers", in_process(read, folder / name, n, min(count, 20_000)))
            for n in (0, 1, 2)
        ]
    return [{"reader": name, "samples/s": f"{value:,.0f}"} for name, value in found]


def main() -> None:
    from train_step import cell, machine, write  # with torch, whose memory is not the reader's

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=40_000)
    parser.add_argument("--store", help="an empty S3 store, instead of a local one started for this")
    arguments = parser.parse_args()
    about = machine("cpu") | {"cores": os.cpu_count(), "samples": f"{arguments.samples:,} of {SAMPLE_BYTES:,} bytes"}
    folder = Path(tempfile.mkdtemp(prefix="sfl-"))
    try:
        rows = rates(folder, make_samples(arguments.samples), arguments.store)
        seconds, megabytes = many_shards(folder / "many")
        parts_seconds, scattered, compacted = many_parts(folder / "parts")
    finally:
        shutil.rmtree(folder)
    about["100,000 shards (410 million samples)"] = f"open in {seconds:.2f} s, {megabytes:.0f} MB at most"
    about["300 parts of 64 samples"] = (
        f"open in {parts_seconds:.2f} s; {scattered:,.0f} samples/s, {compacted:,.0f} once compacted"
    )
    for order in (shuffling(256, 64), shuffling(*COLD_ORDER)):
        about[f"shuffling, {order.pop('order')}"] = ", ".join(f"{key} {cell(value)}" for key, value in order.items())
    about["load at the end"] = f"{os.getloadavg()[0]:.2f}"
    write("loader", "Loader: memory-mapped Zarr shards, beside WebDataset and MosaicML streaming", about, rows)


if __name__ == "__main__":
    main()
