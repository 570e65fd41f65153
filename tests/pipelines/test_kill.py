"""SIGKILL of the real command at fifty random moments; tests/pipelines/test_refresh.py dies at every single write."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
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
from ray.cluster_utils import Cluster

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
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    arguments = {"num_cpus": 2, "include_dashboard": False, "node_ip_address": "127.0.0.1"}
    cluster = Cluster(initialize_head=True, head_node_args={**arguments, "object_store_memory": 100 * 2**20})
    yield cluster.address
    cluster.shutdown()


class Nights:
    """Refreshes of a growing list into one store, by the command as a user runs it."""

    def __init__(self, folder: Path, web: Web, cluster: str, captioner: str) -> None:
        self.folder, self.web = folder, web
        self.settings = [f"ray_address={cluster}", f"captioner={captioner}", "captioner_model=any", "batch_size=16"]
        self.settings += ["actors=1", "text_encoder=null", "--allow-host", "127.0.0.1", "--json"]
        for pictures in NIGHTS:
            urls = [f"{web.base}/{seed}.png" for seed in range(pictures)]
            captions = [f"picture {seed}" for seed in range(pictures)]
            pq.write_table(pa.table({"url": urls, "caption": captions}), folder / f"{pictures}.parquet")

    def start(self, pictures: int, store: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "starflow.cli", "refresh", "--store", str(store)]
        command += ["--urls", str(self.folder / f"{pictures}.parquet"), *self.settings]
        with (self.folder / "errors.log").open("wb") as errors:
            return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, start_new_session=True)

    def finish(self, process: subprocess.Popen[bytes]) -> dict[str, Any]:
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, (self.folder / "errors.log").read_text()
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
            self.finish(process)
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
        calm, seconds = tmp_path / "calm", {}
        for pictures in NIGHTS:
            started = time.monotonic()
            answer = nights.finish(nights.start(pictures, calm))
            seconds[pictures] = time.monotonic() - started
            assert answer["added"] + sum(answer["dropped"].values()) == 20
        expected = content(calm, tmp_path / "cache")
        moments, kills, chains = random.Random(0), 0, 0
        while kills < KILLS:
            store, chains = tmp_path / f"store-{chains}", chains + 1
            for pictures in NIGHTS:
                while nights.killed(pictures, store, seconds[pictures] * moments.random()):
                    kills += 1
            assert content(store, tmp_path / "cache") == expected


def committed_paths(store: Path) -> set[str]:
    """Paths of the URLs in committed batches."""
    paths = set()
    for record in store.glob("crawl/refreshes/*/batches/*/crawl.json"):
        table = pq.read_table(store / json.loads(record.read_text())["fetched"]["key"])
        paths |= {url.rpartition("/")[2] for url in table["url"].to_pylist()}
    return {f"/{path}" for path in paths}
