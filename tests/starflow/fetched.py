"""What a refresh leaves of the pictures that it fetched, shared by tests of what reads them."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import batches
from pipelines.plan import Batch
from starflow import manifest
from starflow.objectstore import ObjectStore


def write_batch(store: ObjectStore, name: str, pictures: dict[str, bytes]) -> None:
    """A finished batch of a refresh: a tar (here just the bytes), the table of its samples, the record."""
    folder = f"crawl/refreshes/000001/batches/{name}/"
    store.write(f"{folder}images.tar", b"".join(pictures.values()))
    rows, offset = [], 0
    for id, data in pictures.items():
        rows.append({"id": id, "image": {"key": f"{folder}images.tar", "offset": offset, "size": len(data)}})
        offset += len(data)
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=batches.SAMPLES), sink)
    samples = manifest.put(store, f"{folder}samples.parquet", sink.getvalue())
    record = batches.FilterRecord(
        samples=samples, dropped=samples, takedowns=None, count=len(rows), reasons={}, examples={}
    )
    batches.commit_record(store, Batch(folder=folder, rows=samples, count=len(rows)), record)
