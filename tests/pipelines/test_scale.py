"""Planning a long list holds neither the list nor the ledger in memory, and an unchanged list asks for nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

PARTITIONS = 64

#: Plans the list; with `learn`, records in the ledger that every URL gave a picture. Prints what it took.
CHILD = """
import json, resource, sys, tempfile, time
from pathlib import Path
import numpy as np, pyarrow as pa
from pipelines.config import RefreshConfig
from pipelines.ledger import SCHEMA, Spill, get_table
from pipelines.refresh import plan
from pipelines.state import RefreshState

urls, store, learn, partitions = sys.argv[1:]
config = RefreshConfig(urls=urls, store=store, contact="me@example.org", ledger_partitions=partitions)
with tempfile.TemporaryDirectory() as work:
    state = RefreshState(config, Path(work), lambda event: None)
    started = time.monotonic()
    counts = plan(state)
    seconds, peak = time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if learn == "learn":
        spill = Spill(Path(work) / "learned", state.ledger.partitions)
        for batch in state.batches:
            spill.add(get_table(state.store, batch.rows))
        files = {}
        for number, rows in spill.read():
            filler = {"status": "ok", "reason": "", "dropped": "", "http": 200, "attempts": 0, "phash": 0}
            columns = {name: rows[name] for name in ("key", "url", "first_seen")}
            columns |= {name: pa.repeat(value, len(rows)) for name, value in filler.items()}
            ids = pa.array([f"{key}{key}" for key in rows["key"].to_pylist()])
            columns |= {"last_seen": rows["first_seen"], "id": ids}
            columns = {field.name: columns.get(field.name, pa.nulls(len(rows))) for field in SCHEMA}
            files[number] = state.ledger.write(number, pa.table(columns).cast(SCHEMA))
        state.ledger.commit(None, files, ())
    print(json.dumps(counts | {"seconds": seconds, "megabytes": peak}))
"""


def write_list(path: Path, count: int) -> None:
    schema = pa.schema([("url", pa.string()), ("caption", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, count, 2**16):
            numbers = range(first, min(first + 2**16, count))
            urls = [f"http://host-{number % 5000}.example/pictures/{number}.jpg" for number in numbers]
            captions = [f"a caption as long as they usually are, of picture {number}" for number in numbers]
            writer.write_table(pa.table([urls, captions], schema=schema))


def run(urls: Path, store: Path, learn: str = "") -> dict[str, float]:
    command = [sys.executable, "-c", CHILD, str(urls), str(store), learn, str(PARTITIONS)]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    answer: dict[str, float] = json.loads(finished.stdout)
    return answer


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_five_million_urls_need_no_more_memory_than_half_a_million(tmp_path: Path) -> None:
    peaks = []
    for count in (500_000, 5_000_000):
        listed, store = tmp_path / f"{count}.parquet", tmp_path / f"store-{count}"
        write_list(listed, count)
        first = run(listed, store, "learn")
        assert (first["urls"], first["batches"]) == (count, count // 10_000)
        again = run(listed, store)
        assert (again["urls"], again["batches"]) == (0, 0)
        print(f"{count:,} URLs: new {first}, unchanged {again}")
        peaks.append(max(first["megabytes"], again["megabytes"]))
        held = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
        print(f"{held / count:.0f} bytes of plan and ledger a URL")
    assert peaks[1] < peaks[0] + 200
