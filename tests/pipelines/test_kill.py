"""SIGKILL of the real command at fifty random moments; tests/pipelines/test_refresh.py dies at every single write."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from starflow.objectstore import open_store
from starflow.reader import SnapshotReader
from starflow.snapshots import load_snapshot, snapshot_numbers
from starflow.upkeep import verify
from tests.pipelines.fake_captioners import serve_endpoint
from tests.pipelines.fake_crawl import png

KILLS = 50
#: Pictures in the list, night after night.
NIGHTS = (20, 40, 60)


class Web:
    """Serves /<seed>.png; every tenth is missing. Counts requests by path."""

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                web.requests[self.path] += 1
                name = self.path[1:].removesuffix(".png")
                found = name.isdigit() and int(name) % 10 != 9
                body = png(int(name)) if found else b""
                self.send_response(200 if found else 404)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def web() -> Iterator[Web]:
    web = Web()
    threading.Thread(target=web.server.serve_forever, args=(0.05,), daemon=True).start()
    yield web
    web.server.shutdown()
    web.server.server_close()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a Ray cluster that outlives the killed commands: starting one takes longer than all else."""
    settings = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_raylet_start_wait_time_s": "300"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder = tempfile.mkdtemp(prefix="ray-")  # short, for its sockets, and not where others look for a running cluster
    options = [f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=2", "--include-dashboard=false"]
    options += [f"--object-store-memory={100 * 2**20}", f"--temp-dir={folder}"]
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        with socket.socket() as probe:
            while probe.connect_ex(("127.0.0.1", port)):
                assert process.poll() is None, "Ray ended"
                assert time.monotonic() < deadline, "Ray did not start"
                time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        process.wait(timeout=60)
        psutil.wait_procs(children, timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


class Nights:
    """Refreshes of a growing list into one store, by the command as a user runs it."""

    def __init__(self, folder: Path, web: Web, cluster: str, captioner: str) -> None:
        self.folder, self.web = folder, web
        self.settings = [f"ray_address={cluster}", f"captioner={captioner}", "captioner_model=any", "batch_size=20"]
        self.settings += ["actors=1", "text_encoder=null", "--allow-host", "127.0.0.1", "--json"]
        for pictures in NIGHTS:
            urls = [f"{web.base}/{seed}.png" for seed in range(pictures)]
            captions = [f"picture {seed}" for seed in range(pictures)]
            pq.write_table(pa.table({"url": urls, "caption": captions}), folder / f"{pictures}.parquet")

    def start(self, pictures: int, store: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "starflow.cli", "refresh", "--store", str(store)]
        command += ["--urls", str(self.folder / f"{pictures}.parquet"), *self.settings]
        with self.log(pictures).open("wb") as errors:
            return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, start_new_session=True)

    def log(self, pictures: int) -> Path:
        return self.folder / f"errors-{pictures}.log"

    def finish(self, pictures: int, process: subprocess.Popen[bytes]) -> dict[str, Any]:
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, self.log(pictures).read_text()
        answer: dict[str, Any] = json.loads(output)
        return answer

    def killed(self, pictures: int, store: Path, moment: float) -> bool:
        """Runs one refresh until it ends or the moment, in seconds, has come; True when it was killed."""
        committed = committed_paths(store)
        self.web.requests.clear()
        process = self.start(pictures, store)
        try:
            process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            children = psutil.Process(process.pid).children(recursive=True)
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            expect_no_crawl(children)
        else:
            self.finish(pictures, process)
        assert not committed & set(self.web.requests), "fetched again what was committed"
        return process.returncode != 0


def content(store: Path, cache: Path) -> list[Any]:
    """Ids, captions and latents, in order, and the counts of every snapshot, all bytes checked."""
    opened, found = open_store(str(store)), []
    for number in snapshot_numbers(opened):
        snapshot = load_snapshot(opened, str(number))
        assert verify(opened, snapshot, read=True) == []
        reader = SnapshotReader(opened, snapshot, cache)
        batches = [reader.gather(grid, np.arange(reader.count(grid))) for grid in sorted(reader.grids)]
        samples = [
            (list(batch.ids), list(batch.captions), batch.mean.tobytes(), batch.std.tobytes()) for batch in batches
        ]
        found.append((snapshot.counts, snapshot.dropped, samples))
    return found


def expect_no_crawl(children: list[psutil.Process]) -> None:
    """The crawl's processes, in a session of their own, end with the command."""
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive, "processes outlived the command"


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_command_killed_fifty_times_ends_the_same(tmp_path: Path, web: Web, cluster: str) -> None:
    with serve_endpoint() as endpoint:
        nights = Nights(tmp_path, web, cluster, endpoint.url)
        began, calm, seconds = time.monotonic(), tmp_path / "calm", {}
        for pictures in NIGHTS:
            started = time.monotonic()
            answer = nights.finish(pictures, nights.start(pictures, calm))
            seconds[pictures] = time.monotonic() - started
            assert answer["added"] + sum(answer["dropped"].values()) == 20
        expected = content(calm, tmp_path / "cache")
        moments, kills, chains = random.Random(0), 0, 0
        while kills < KILLS:
            store, chains = tmp_path / f"store-{chains}", chains + 1
            for pictures in NIGHTS:
                while nights.killed(pictures, store, seconds[pictures] * moments.random()):
                    kills += 1
                    seconds[pictures] *= 1.1  # so that about as many are killed as end, however busy the machine
                seconds[pictures] *= 0.8
            assert content(store, tmp_path / "cache") == expected
            print(f"{kills} kills in {chains} stores, {time.monotonic() - began:.0f} s", flush=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_commands_at_once_lose_nothing(tmp_path: Path, web: Web, cluster: str) -> None:
    """Two lists, one store: each ends well or says to run it again, and then everything is there once."""
    with serve_endpoint() as endpoint:
        nights = Nights(tmp_path, web, cluster, endpoint.url)
        urls = pq.read_table(tmp_path / "40.parquet")
        for pictures, start in ((1, 0), (2, 20)):
            pq.write_table(urls.slice(start, 20), tmp_path / f"{pictures}.parquet")
        waiting, published = [1, 2], 0
        for _ in range(4):
            running = {pictures: nights.start(pictures, tmp_path / "store") for pictures in waiting}
            waiting = []
            for pictures, process in running.items():
                process.communicate(timeout=600)
                if process.returncode:
                    waiting.append(pictures)
                    assert "run the same command again" in nights.log(pictures).read_text()
                else:
                    published += 1
        assert (waiting, published) == ([], 2)
        *_, (counts, _, samples) = content(tmp_path / "store", tmp_path / "cache")
        ids = [id for grid in samples for id in grid[0]]
        assert (counts.total, len(ids), len(set(ids))) == (36, 36, 36)


def committed_paths(store: Path) -> set[str]:
    """Paths of the URLs in committed batches."""
    paths = set()
    for record in store.glob("crawl/refreshes/*/batches/*/crawl.json"):
        table = pq.read_table(store / json.loads(record.read_text())["fetched"]["key"])
        paths |= {url.rpartition("/")[2] for url in table["url"].to_pylist()}
    return {f"/{path}" for path in paths}
