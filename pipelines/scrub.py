"""Erases what was taken down from the pictures and tables that finished refreshes have left behind.

Original pictures lie in uncompressed tars: their bytes are overwritten with zeros in place, so every other
picture stays where the tables say it is. Rows are removed from tables, and the records of encoding, which nobody
needs once a refresh is finished, are deleted. A refresh still at work is left alone: it drops what was taken
down by itself, and is scrubbed once it has finished.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.batches import VERSION, CrawlRecord
from pipelines.ledger import Ledger
from starflow import manifest
from starflow.errors import NotFoundError
from starflow.objectstore import ObjectStore
from starflow.snapshots import newest_snapshot
from starflow.takedowns import Takedowns

PREFIX = "crawl/refreshes/"
#: What has been scrubbed already: the list of takedowns, and up to which refresh.
DONE = "gc/scrubbed.json"


def scrub_sources(store: ObjectStore) -> int:
    """Scrubs everything that the newest snapshot records as taken down; returns how many pictures were erased."""
    newest = newest_snapshot(store)
    if newest is None or newest.takedowns is None:
        return 0
    finished = Ledger(store, 1).generation
    done = _done(store, newest.takedowns.sha256)
    takedowns = Takedowns.load(store, newest.takedowns)
    folders: dict[int, list[str]] = defaultdict(list)
    for info in store.list(PREFIX):
        folders[int(info.key.split("/")[2])].append(info.key)
    erased = sum(_scrub(store, keys, takedowns) for number, keys in folders.items() if done < number <= finished)
    record = {"takedowns": newest.takedowns.sha256, "refresh": finished}
    store.write(DONE, json.dumps(record).encode())
    return erased


def _done(store: ObjectStore, takedowns: str) -> int:
    try:
        record = json.loads(store.read(DONE))
    except NotFoundError:
        return 0
    return int(record["refresh"]) if record["takedowns"] == takedowns else 0


def _scrub(store: ObjectStore, keys: Iterable[str], takedowns: Takedowns) -> int:
    """Scrubs the objects of one finished refresh."""
    tars = {_tar(store, key) for key in keys if key.endswith("/crawl.json")}
    # Tars that no record names are left over from killed runs.
    work = [key for key in keys if "/encode/" in key or "/captions/" in key]
    store.delete([*work, *(key for key in keys if key.endswith(".tar") and key not in tars)])
    tables = [key for key in keys if key.endswith(".parquet") and "/encode/" not in key]
    names: set[str] = set()  # of rows to remove: normalised URLs' keys, and ids
    pictures: dict[str, set[tuple[int, int]]] = defaultdict(set)
    for key in tables:
        found, tar, places = _blocked(store, key, takedowns)
        names |= found
        if places:
            pictures[tar] |= places
    for tar, places in pictures.items():
        _erase(store, tar, places)
    if names:
        for key in tables:
            _remove_rows(store, key, names)
    return sum(map(len, pictures.values()))


def _erase(store: ObjectStore, tar: str, places: Iterable[tuple[int, int]]) -> None:
    """Overwrites each (offset, size) of the tar with zeros, on the disk: a tar has gigabytes."""
    with tempfile.TemporaryDirectory(prefix="starflow-scrub-") as folder:
        path = Path(folder) / "images.tar"
        store.download(tar, path)
        with path.open("r+b") as file:
            for offset, size in places:
                file.seek(offset)
                file.write(bytes(size))
        store.upload(tar, path)


def _tar(store: ObjectStore, record_key: str) -> str:
    """The tar of a batch; empty when it fetched no picture."""
    record = CrawlRecord.model_validate(manifest.load(store, record_key, CrawlRecord.__name__, VERSION))
    return record.images.key if record.images else ""


def _blocked(store: ObjectStore, key: str, takedowns: Takedowns) -> tuple[set[str], str, set[tuple[int, int]]]:
    """(names of the rows of a table that were taken down, the tar and each (offset, size) of their pictures)."""
    table = pq.read_table(io.BytesIO(store.read(key)))
    if "url" not in table.column_names:
        return set(), "", set()
    ids = table["id"].to_pylist() if "id" in table.column_names else [None] * len(table)
    table = table.filter(pa.array(takedowns.blocks(ids, table["url"].to_pylist())))
    names = {name for column in {"key", "id"} & set(table.column_names) for name in table[column].to_pylist()}
    tar, places = "", set()
    if len(table) and {"offset", "size"} <= set(table.column_names):  # what a crawl has fetched
        tar = _tar(store, f"{key.rpartition('/')[0]}/crawl.json")
        rows = zip(table["offset"].to_pylist(), table["size"].to_pylist(), strict=True)
        places = {(offset, size) for offset, size in rows if offset is not None}
    return names - {None}, tar, places


def _remove_rows(store: ObjectStore, key: str, names: set[str]) -> None:
    table = pq.read_table(io.BytesIO(store.read(key)))
    wanted = np.ones(len(table), bool)
    for column in {"key", "id"} & set(table.column_names):
        wanted &= ~pc.is_in(table[column].combine_chunks(), pa.array(sorted(names))).to_numpy(zero_copy_only=False)
    if not wanted.all():
        buffer = io.BytesIO()
        pq.write_table(table.filter(pa.array(wanted)), buffer, compression="zstd")
        store.write(key, buffer.getvalue())
