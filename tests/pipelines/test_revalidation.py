"""Pictures of a snapshot are asked for again, over real HTTP and through the real crawl process."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import RefreshConfig
from pipelines.refresh import RefreshResult, refresh
from starflow import manifest
from starflow.objectstore import open_store
from starflow.snapshots import load_snapshot
from tests.pipelines.fake_crawl import fake_encode, png

PAGES = ("etag", "date", "plain", "changed", "gone", "missing", "opted-out", "opted-out-304", "page", "down")
#: What happens to the pages between the two refreshes, as (status, body, headers); the others stay as they were.
LATER: dict[str, tuple[int, bytes, dict[str, str]]] = {
    "changed": (200, png(99), {}),
    "gone": (410, b"", {}),
    "missing": (404, b"", {}),
    "opted-out": (200, png(PAGES.index("opted-out")), {"X-Robots-Tag": "starflow: noai"}),
    "opted-out-304": (304, b"", {"X-Robots-Tag": "unavailable_after: 1 Jan 2020 00:00:00 GMT"}),
    "page": (200, b"<!doctype html><title>no picture</title>", {"Content-Type": "image/png"}),
    "down": (503, b"", {"Retry-After": "7200"}),
}


class Web:
    """Pictures with validators, which change when `later` is set. Counts requests, and how many were conditional."""

    def __init__(self) -> None:
        self.later = False
        self.requests: Counter[str] = Counter()
        self.conditional: set[str] = set()
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path[1:]
                if name not in PAGES:
                    self.answer(404, b"", {})
                    return
                web.requests[name] += 1
                validators = {
                    "etag": {"ETag": '"v1"'},
                    "opted-out-304": {"ETag": '"v1"'},
                    "date": {"Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"},
                }.get(name, {})
                told = self.headers.get("If-None-Match") or self.headers.get("If-Modified-Since")
                if told:
                    web.conditional.add(name)
                if web.later and name in LATER:
                    self.answer(*LATER[name])
                elif told and told in validators.values():
                    self.answer(304, b"", validators)
                else:
                    self.answer(200, png(PAGES.index(name)), validators)

            def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                if status != 304:
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


def test_what_servers_say_when_they_are_asked_again(tmp_path: Path, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    now = datetime(2026, 6, 1, tzinfo=UTC)
    monkeypatch.setattr("pipelines.batches.utc_now", lambda: now)
    monkeypatch.setattr("pipelines.encode.encode", fake_encode)
    urls = [f"{web.base}/{name}" for name in PAGES]
    pq.write_table(pa.table({"url": urls, "caption": list(PAGES)}), tmp_path / "list.parquet")
    config = RefreshConfig(
        urls=str(tmp_path / "list.parquet"),
        store=str(tmp_path / "store"),
        allow_host=("127.0.0.1",),
        retry_rounds=0,
        revalidate_days=30,
    )

    def run(days: float) -> RefreshResult:
        nonlocal now
        now += timedelta(days=days)
        return refresh(config)

    first = run(0)
    assert (first.added, first.removed, web.requests.total()) == (len(PAGES), {}, len(PAGES))
    web.later = True
    second = run(31)
    assert web.requests == Counter(dict.fromkeys(PAGES, 2))
    assert web.conditional == {"etag", "date", "opted-out-304"}
    assert (second.added, second.kept, second.total) == (1, 5, 6)
    assert second.removed == {"changed": 1, "gone": 2, "opted_out": 2}
    assert second.dropped == {"http_404": 1, "http_410": 1, "http_503": 1, "not_an_image": 1, "x_robots_tag": 2}
    store = open_store(config.store)
    tables = [pq.read_table(pa.BufferReader(manifest.get(store, p.samples))) for p in load_snapshot(store).parts]
    names = [url.rpartition("/")[2] for table in tables for url in table["url"].to_pylist()]
    assert sorted(names) == ["changed", "date", "down", "etag", "page", "plain"]
    third = run(1)
    assert (third.snapshot, web.requests["down"], web.requests.total()) == (second.snapshot, 3, 2 * len(PAGES) + 1)
