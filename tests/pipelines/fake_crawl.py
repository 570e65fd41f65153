"""A web in a dictionary, and an encoder that encodes nothing: a refresh's own logic without processes."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines import batches
from pipelines.config import RefreshConfig
from pipelines.crawl import OUTCOME
from pipelines.encode_plan import EncodeConfig
from pipelines.guard import FetchPolicy
from pipelines.inspection import inspect_image
from pipelines.ledger import Ledger
from pipelines.refresh import RefreshResult, refresh
from starflow import manifest
from starflow.encoders import VAEIdentity
from starflow.objectstore import ObjectStore, open_store
from starflow.parts import LayerPlan, part_from_arrays
from starflow.snapshots import load_snapshot

#: What a URL answers: bytes, or (status, reason), or with seconds of Retry-After and the HTTP status, too.
Answer = bytes | tuple[Any, ...]


def png(seed: int, size: int = 32) -> bytes:
    """A random picture; the same seed gives the same bytes."""
    blocks = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(blocks.repeat(size // 8, 0).repeat(size // 8, 1)).save(file, "PNG")
    return file.getvalue()


class FakeWeb:
    """Answers by URL; a list of answers is gone through, its last one repeated. `requests` counts."""

    def __init__(self, answers: dict[str, Answer | list[Answer]]) -> None:
        self.answers = answers
        self.requests: Counter[str] = Counter()

    def fetch_batch(
        self,
        urls: pa.Table,
        policy: FetchPolicy,
        processes: int,
        threads: int,
        folder: Path,
        rules_cache: Path,
        on_progress: Callable[[int], None],
    ) -> pa.Table:
        """In the place of pipelines.crawl.fetch_batch."""
        (folder / "output").mkdir(parents=True)
        records = []
        with (folder / "output" / "00000.bin").open("wb") as file:
            for row, url in enumerate(urls["url"].to_pylist()):
                answer = self.answers[url]
                if isinstance(answer, list):
                    answer = answer[min(self.requests[url], len(answer) - 1)]
                self.requests[url] += 1
                record: dict[str, Any] = {"row": row, "status": "ok", "reason": "", "http": 0}
                if isinstance(answer, bytes):
                    seen = inspect_image(answer, policy.max_pixels, policy.max_frames)
                    record |= vars(seen) | {"id": hashlib.sha256(answer).hexdigest(), "etag": '"1"', "shard": 0}
                    record |= {"offset": file.tell(), "size": len(answer)}
                    file.write(answer)
                else:
                    record |= dict(zip(("status", "reason", "retry_after", "http"), answer, strict=False))
                records.append(record)
        on_progress(len(records))
        return pa.Table.from_pylist(records, OUTCOME)


def fake_encode(store: ObjectStore, tables: Sequence[str], config: EncodeConfig, work: str, on_progress: Any) -> Any:
    """In the place of pipelines.encode.encode: one part of zeros, with the samples' ids and captions."""
    from pipelines.encode import EncodeResult

    rows = pa.concat_tables([pq.read_table(pa.BufferReader(store.read(key))) for key in tables])
    texts = [captions[0]["text"] if captions else None for captions in rows["captions"].to_pylist()]
    latents = np.zeros((len(rows), 4, 4, 4), np.float16)
    vae = VAEIdentity(name=config.vae, sha256="0" * 64, scaling_factor=1.0, channels=4, downsampling=8)
    layer = LayerPlan(origin="alt-text", version="1")
    part = part_from_arrays(store, vae, latents, latents, rows, [(layer, texts)])
    return EncodeResult(parts=(part,), dropped={})


class Bench:
    """A store, a list and a fake web to refresh from."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.store = folder, str(folder / "store")
        self.web = FakeWeb({})
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        monkeypatch.setattr("pipelines.batches.utc_now", lambda: self.now)
        monkeypatch.setattr(batches, "fetch_batch", lambda *arguments: self.web.fetch_batch(*arguments))
        monkeypatch.setattr("pipelines.encode.encode", fake_encode)

    def write_list(self, answers: dict[str, Answer | list[Answer]], name: str = "list") -> Path:
        """Adds the answers to the web and writes a list of their URLs, with captions."""
        self.web.answers |= answers
        path = self.folder / f"{name}.parquet"
        urls = list(answers)
        pq.write_table(pa.table({"url": urls, "caption": [f"picture at {url}" for url in urls]}), path)
        return path

    def config(self, urls: Path, **settings: Any) -> RefreshConfig:
        """Small batches, a contact, and `settings`."""
        defaults: dict[str, Any] = {"contact": "me@example.org", "batch_size": 4, "ledger_partitions": 3}
        return RefreshConfig(urls=str(urls), store=self.store, **{**defaults, **settings})

    def refresh(self, urls: Path, **settings: Any) -> RefreshResult:
        """Runs a refresh to its end."""
        return refresh(self.config(urls, **settings))


def url(name: object) -> str:
    """A URL on a host that does not exist."""
    return f"http://pictures.example/{name}.png"


#: Two batches, each kind of outcome once.
MIXED: dict[str, Answer | list[Answer]] = {
    **{url(index): png(index) for index in range(5)},
    url("copy"): png(0),
    url("gone"): ("failed", "http_404"),
    url("optout"): ("opt_out", "x_robots_tag"),
    url("flaky"): [("retry", "http_500"), png(50)],
    url("down"): ("retry", "timeout"),
    url("small"): png(60, size=8),
}
#: The same without the one that depends on how often it was asked.
STEADY = {name: answer for name, answer in MIXED.items() if name != url("flaky")}
MIXED_DROPS = {"duplicate": 1, "http_404": 1, "timeout": 1, "too_small": 1, "x_robots_tag": 1}


def ledger_rows(bench: Bench) -> dict[str, dict[str, Any]]:
    ledger = Ledger(open_store(str(bench.store)), 3)
    rows = [row for partition in range(ledger.partitions) for row in ledger.read(partition).to_pylist()]
    assert len({row["key"] for row in rows}) == len(rows)
    return {row["url"]: row for row in rows}


def sample_urls(bench: Bench) -> set[str]:
    """URLs of the newest snapshot's samples, each once."""
    store = open_store(str(bench.store))
    tables = [pq.read_table(pa.BufferReader(manifest.get(store, p.samples))) for p in load_snapshot(store).parts]
    urls = [url for table in tables for url in table["url"].to_pylist()]
    assert len(set(urls)) == len(urls)
    return set(urls)
