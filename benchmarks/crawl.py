"""Guarded crawl against bare img2dataset: the same list, server, processes and threads, in the same run.

Two ways of using img2dataset bare are measured: keeping the bytes as they come, which decodes nothing, and its usual
centre crop to 256 pixels. Ours checks every address, byte, second and rule, decodes each picture completely to find
corrupt ones, and hashes it; it keeps the original bytes. Runs alternate and the best of each counts, by wall clock
within img2dataset (its own statistics) and by CPU seconds of all its processes, which a busy machine disturbs less.

    python benchmarks/crawl.py --urls 3000 --repeats 3
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.config import RefreshConfig
from pipelines.crawl import fetch_batch

PROCESSES, THREADS = 2, 64
PICTURES = 64
RESULTS = Path(__file__).parent / "results" / "crawl.md"
BARE = {
    "bare, bytes kept": {"disable_all_reencoding": True},
    "bare, 256 px centre crop": {"image_size": 256, "resize_mode": "center_crop"},
}
OURS = "guarded, bytes kept, decoded and hashed"


def pictures(width: int, height: int) -> list[bytes]:
    """JPEG pictures with photograph-like smooth colours."""
    result = []
    for seed in range(PICTURES):
        coarse = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=90)
        result.append(file.getvalue())
    return result


def serve(bodies: list[bytes], ready: Connection) -> None:
    """Serves /<number>.jpg on loopback until the process is terminated."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            name = head.split(" ", 2)[1][1:].partition(".")[0]
            body, status = (bodies[int(name) % PICTURES], "200 OK") if name.isdigit() else (b"", "404 Not Found")
            writer.write(
                f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body
            )
            await writer.drain()
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=1024)
        ready.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


def run_bare(urls: pa.Table, folder: Path, settings: dict[str, object]) -> None:
    """img2dataset as it comes."""
    pq.write_table(urls.select(["url"]), folder / "list.parquet")
    arguments = {
        "url_list": str(folder / "list.parquet"),
        "input_format": "parquet",
        "output_folder": str(folder / "output"),
        "output_format": "webdataset",
        "processes_count": PROCESSES,
        "thread_count": THREADS,
        "number_sample_per_shard": -(-len(urls) // PROCESSES),
        "extract_exif": False,
        **settings,
    }
    code = "import json, sys; from img2dataset import download; download(**json.loads(sys.argv[1]))"
    environment = os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1"}
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def run_guarded(urls: pa.Table, folder: Path) -> None:
    """What a refresh runs."""
    config = RefreshConfig(urls="-", store="-", allow_host=("127.0.0.1",))
    (folder / "rules").mkdir()
    outcomes = fetch_batch(urls, config.policy(), PROCESSES, THREADS, folder / "batch", folder / "rules")
    assert set(outcomes["status"].to_pylist()) == {"ok"}


def measure(run: Callable[[Path], None], count: int) -> dict[str, float]:
    """URLs a second by img2dataset's statistics, seconds with its start, CPU seconds per thousand URLs."""
    with tempfile.TemporaryDirectory(prefix="bench-crawl-") as name:
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        run(Path(name))
        seconds, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        stats = [json.loads(path.read_text()) for path in Path(name).rglob("*_stats.json")]
    assert sum(each["successes"] for each in stats) == count
    span = max(each["end_time"] for each in stats) - min(each["start_time"] for each in stats)
    cpu = (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
    return {"rate": count / span, "seconds": seconds, "cpu": 1000 * cpu / count}


def main() -> None:
    """Measures, prints the table and writes it to benchmarks/results/crawl.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--urls", type=int, default=3000)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    bodies = pictures(options.width, options.height)
    ready, sender = multiprocessing.Pipe(duplex=False)
    server = multiprocessing.Process(target=serve, args=(bodies, sender), daemon=True)
    server.start()
    port = ready.recv()
    addresses = [f"http://127.0.0.1:{port}/{index}.jpg" for index in range(options.urls)]
    empty = [""] * options.urls
    urls = pa.table({"url": addresses, "etag": empty, "last_modified": empty})
    runs: dict[str, Callable[[Path], None]] = {
        name: lambda folder, settings=settings: run_bare(urls, folder, settings)  # type: ignore[misc]
        for name, settings in BARE.items()
    }
    runs[OURS] = lambda folder: run_guarded(urls, folder)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for _ in range(options.repeats):
        for name, run in runs.items():
            found[name].append(measure(run, options.urls))
    server.terminate()
    server.join()
    best = {name: max(each["rate"] for each in each_run) for name, each_run in found.items()}
    lines = ["| crawl | URLs/s | seconds with start | CPU s per 1,000 URLs |", "|---|---:|---:|---:|"]
    for name, measured in found.items():
        seconds, cpu = (min(each[key] for each in measured) for key in ("seconds", "cpu"))
        lines.append(f"| {name} | {best[name]:,.0f} | {seconds:.1f} | {cpu:.2f} |")
    shares = [f"{best[OURS] / best[name]:.2f} of {name}" for name in BARE]
    mean_bytes = sum(map(len, bodies)) / len(bodies)
    text = [
        "# Crawl: guarded against bare img2dataset",
        "",
        *lines,
        "",
        f"Ours is {' and '.join(shares)}, by URLs/s. {options.urls:,} URLs of {options.width} x {options.height} JPEG "
        f"pictures ({mean_bytes / 1000:.0f} kB), {PROCESSES} processes of {THREADS} threads, server on the same "
        f"machine, best of {options.repeats} alternating runs.",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}, "
        f"Python {platform.python_version()}. `python benchmarks/crawl.py`",
        "",
    ]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join(text), encoding="utf-8")
    print("\n".join(text))


if __name__ == "__main__":
    main()
