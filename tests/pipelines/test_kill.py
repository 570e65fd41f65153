"""SIGKILL of the real command at random moments; tests/pipelines/test_refresh.py dies at every single write."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from starflow import manifest
from starflow.objectstore import open_store
from starflow.snapshots import load_snapshot
from tests.pipelines.fake_crawl import png

PICTURES, KILLS = 40, 4


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


def start(listed: Path, store: Path, log: Path) -> subprocess.Popen[bytes]:
    """The command, as a user runs it; three batches, small pictures, one actor."""
    command = [sys.executable, "-m", "starflow.cli", "refresh", "--urls", str(listed), "--store", str(store)]
    command += ["--allow-host", "127.0.0.1", "--json", "batch_size=16", "actors=1", "text_encoder=null"]
    with log.open("wb") as errors:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors)


def finish(process: subprocess.Popen[bytes], log: Path) -> dict[str, Any]:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, log.read_text()
    answer: dict[str, Any] = json.loads(output)
    return answer


def content(store: Path) -> tuple[Any, ...]:
    """Samples in order with their captions, and counts, of the newest snapshot."""
    opened = open_store(str(store))
    snapshot = load_snapshot(opened)
    rows = []
    for part in snapshot.parts:
        samples = pq.read_table(pa.BufferReader(manifest.get(opened, part.samples)))
        captions = pq.read_table(pa.BufferReader(manifest.get(opened, part.captions[0].captions)))
        rows += list(zip(samples["id"].to_pylist(), captions["caption"].to_pylist(), strict=False))
    return rows, snapshot.counts, snapshot.dropped, [part.id for part in snapshot.parts]


def expect_no_crawl(children: list[psutil.Process]) -> None:
    """The crawl ends with the command; what Ray leaves behind ends by itself and is not waited for."""
    crawling = []
    for child in children:
        with suppress(psutil.NoSuchProcess):
            if "crawl_worker" in " ".join(child.cmdline()):
                crawling.append(child)
    _, alive = psutil.wait_procs(crawling, timeout=10)
    assert not alive, "the crawl's processes outlived the command"


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_killed_command_goes_on_and_ends_the_same(tmp_path: Path, web: Web) -> None:
    listed, log = tmp_path / "list.parquet", tmp_path / "refresh.log"
    urls = [f"{web.base}/{seed}.png" for seed in range(PICTURES)]
    pq.write_table(pa.table({"url": urls, "caption": [f"picture {seed}" for seed in range(PICTURES)]}), listed)
    started = time.monotonic()
    finish(start(listed, tmp_path / "calm", log), log)
    duration = time.monotonic() - started
    moments = random.Random(0)
    for number in range(KILLS):
        store = tmp_path / f"store-{number}"
        process = start(listed, store, log)
        time.sleep(duration * moments.random())
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        expect_no_crawl(children)
        committed = committed_paths(store)
        web.requests.clear()
        finish(start(listed, store, log), log)
        assert content(store) == content(tmp_path / "calm")
        assert not committed & set(web.requests)


def committed_paths(store: Path) -> set[str]:
    """Paths of the URLs in committed batches."""
    paths = set()
    for record in store.glob("crawl/refreshes/*/batches/*/crawl.json"):
        table = pq.read_table(store / json.loads(record.read_text())["fetched"]["key"])
        paths |= {url.rpartition("/")[2] for url in table["url"].to_pylist()}
    return {f"/{path}" for path in paths}
