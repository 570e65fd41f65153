"""What is known of every URL ever asked: Parquet in the store, partitioned by the hash of the normalised URL.

Files are immutable. Each refresh adds a file to the partitions it touched and then commits one manifest,
``crawl/ledger/<generation>.json``, that names all files; a reader takes the newest manifest and trusts nothing else.
In a partition the newest row of a key counts; when its files have become many they are merged into one. One
partition at a time is in memory.
"""

from __future__ import annotations

import hashlib
import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from starflow import manifest
from starflow.config import Config
from starflow.errors import AlreadyExistsError
from starflow.manifest import ObjectRef
from starflow.objectstore import ObjectStore

KIND, VERSION = "crawl-ledger", 1
PREFIX = "crawl/ledger/"
#: Files of a partition before they are merged, and old manifests that are kept.
_MERGE_FILES, _KEEP_MANIFESTS = 8, 3
_SPILL_ROWS = 2**20

MOMENT = pa.timestamp("ms", tz="UTC")  # Parquet knows no seconds
#: One row per URL. `reason` says why `status` is not ok; `dropped` says which filter kept a fetched picture out.
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("url", pa.string()),
        ("status", pa.string()),  # ok, opt_out, retry, failed
        ("reason", pa.string()),
        ("dropped", pa.string()),
        ("http", pa.int16()),
        ("attempts", pa.int16()),
        ("next_retry", MOMENT),
        ("etag", pa.string()),
        ("last_modified", pa.string()),
        ("id", pa.string()),
        ("phash", pa.int64()),
        ("first_seen", MOMENT),
        ("last_seen", MOMENT),
    ]
)
#: The pictures that were kept: what new ones are compared with.
KEPT = pa.schema([("id", pa.string()), ("phash", pa.int64())])


class LedgerManifest(Config):
    """One generation of the ledger, made by one refresh."""

    generation: int
    snapshot: str | None
    partitions: int
    files: dict[int, tuple[ObjectRef, ...]] = Field(default_factory=dict)
    kept: tuple[ObjectRef, ...] = ()


class Ledger:
    """The newest committed generation; generation 0 is the empty ledger of a store without one."""

    def __init__(self, store: ObjectStore, partitions: int) -> None:
        self.store = store
        generations = _generations(store)
        if generations:
            body = manifest.load(store, _key(generations[-1]), KIND, VERSION)
            self.manifest = LedgerManifest.model_validate(body)
        else:
            self.manifest = LedgerManifest(generation=0, snapshot=None, partitions=partitions)
        self.generation, self.partitions = self.manifest.generation, self.manifest.partitions

    def read(self, partition: int) -> pa.Table:
        """The partition's newest row per key."""
        files = self.manifest.files.get(partition, ())
        return newest(pa.concat_tables([SCHEMA.empty_table(), *(get_table(self.store, ref) for ref in files)]))

    def kept(self) -> Iterator[pa.Table]:
        """Ids and perceptual hashes of the pictures kept so far, file by file."""
        for ref in self.manifest.kept:
            yield get_table(self.store, ref)

    def write(self, partition: int, rows: pa.Table) -> tuple[ObjectRef, ...]:
        """Stores `rows` of a partition and returns its files for the next manifest."""
        files = self.manifest.files.get(partition, ())
        if len(files) + 1 > _MERGE_FILES:
            rows, files = newest(pa.concat_tables([self.read(partition), rows])), ()
        name = f"{PREFIX}files/{partition:05d}/{self.generation + 1:09d}"
        return (*files, put_table(self.store, name, rows.sort_by("key")))

    def write_kept(self, rows: pa.Table) -> tuple[ObjectRef, ...]:
        """Stores some of the kept pictures of a refresh and returns the file, if any, for the next manifest."""
        return (put_table(self.store, f"{PREFIX}kept/{self.generation + 1:09d}", rows),) if len(rows) else ()

    def kept_without(self, left: pa.Array) -> tuple[ObjectRef, ...]:
        """The files of the pictures kept so far, for the next manifest, rewritten where they hold an id of `left`."""
        if not len(left):
            return self.manifest.kept
        files: list[ObjectRef] = []
        for ref in self.manifest.kept:
            rows = get_table(self.store, ref)
            staying = rows.filter(pc.invert(pc.is_in(rows["id"], left)))
            files += (ref,) if len(staying) == len(rows) else self.write_kept(staying)
        return tuple(files)

    def commit(
        self, snapshot: str | None, files: dict[int, tuple[ObjectRef, ...]], kept: tuple[ObjectRef, ...]
    ) -> None:
        """Commits the next generation. Raises AlreadyExistsError when another refresh has done so meanwhile."""
        following = LedgerManifest(
            generation=self.generation + 1,
            snapshot=snapshot,
            partitions=self.partitions,
            files={**self.manifest.files, **files},
            kept=kept,
        )
        try:
            manifest.commit(self.store, _key(following.generation), KIND, VERSION, following.model_dump(mode="json"))
        except AlreadyExistsError as error:
            raise AlreadyExistsError(
                f"another refresh of {self.store.url} finished meanwhile (ledger generation "
                f"{following.generation}); run the same command again to go on from there"
            ) from error
        self._prune(following)

    def discard(self, files: dict[int, tuple[ObjectRef, ...]], kept: tuple[ObjectRef, ...]) -> None:
        """Deletes what `write` and `write_kept` stored for a generation that is not going to be committed."""
        written = {ref.key for refs in files.values() for ref in refs} | {ref.key for ref in kept}
        self.store.delete(sorted(written - _named(self.manifest)))

    def _prune(self, current: LedgerManifest) -> None:
        """Deletes old manifests, then the files that only they named."""
        generations = _generations(self.store)
        old, recent = generations[:-_KEEP_MANIFESTS], generations[-_KEEP_MANIFESTS:]
        if not old:
            return
        bodies = {g: manifest.load(self.store, _key(g), KIND, VERSION) for g in (*old, *recent)}
        named = {g: _named(LedgerManifest.model_validate(body)) for g, body in bodies.items()}
        living = set().union(*(named[g] for g in recent), _named(current))
        self.store.delete([_key(g) for g in old])
        self.store.delete(sorted(set().union(*(named[g] for g in old)) - living))


def newest(rows: pa.Table) -> pa.Table:
    """The last row of each key, in the order of those last rows."""
    keys = rows["key"].to_numpy(zero_copy_only=False)
    _, from_end = np.unique(keys[::-1], return_index=True)
    return rows.take(np.sort(len(keys) - 1 - from_end))


def partition_of(keys: Sequence[str], partitions: int) -> np.ndarray:
    """Partition of each key: its first 16 bits, modulo the number of partitions."""
    return np.array([int(key[:4], 16) for key in keys], dtype=np.int64) % partitions


class Spill:
    """Rows on local disk, grouped by ledger partition, so that one partition at a time can be worked on."""

    def __init__(self, folder: Path, partitions: int) -> None:
        self.folder, self.partitions = folder, partitions
        self._buffers: defaultdict[int, list[pa.Table]] = defaultdict(list)
        self._buffered = 0
        self._flushes = 0
        folder.mkdir(parents=True)

    def add(self, rows: pa.Table) -> None:
        """Takes rows with a column `key`."""
        owners = partition_of(rows["key"].to_pylist(), self.partitions)
        order = np.argsort(owners, kind="stable")
        bounds = np.flatnonzero(np.diff(owners[order])) + 1
        for group in np.split(order, bounds):
            if len(group):
                self._buffers[int(owners[group[0]])].append(rows.take(group))
        self._buffered += len(rows)
        if self._buffered >= _SPILL_ROWS:
            self._flush()

    def _flush(self) -> None:
        if not self._buffered:
            return
        for partition, tables in self._buffers.items():
            folder = self._folder(partition)
            folder.mkdir(exist_ok=True)
            pq.write_table(pa.concat_tables(tables), folder / f"{self._flushes:06d}.parquet")
        self._buffers.clear()
        self._buffered = 0
        self._flushes += 1

    def read(self) -> Iterator[tuple[int, pa.Table]]:
        """(partition, its rows in the order they came), for each partition with rows."""
        for partition in range(self.partitions):
            rows = self.partition(partition)
            if rows is not None:
                yield partition, rows

    def partition(self, number: int) -> pa.Table | None:
        """The rows of one partition in the order they came; None when there are none."""
        self._flush()
        files = sorted(self._folder(number).glob("*.parquet"))
        return pa.concat_tables([pq.read_table(file) for file in files]) if files else None

    def _folder(self, partition: int) -> Path:
        return self.folder / f"{partition:05d}"  # of its own: all files in one folder are slow to look through


def put_table(store: ObjectStore, name: str, table: pa.Table) -> ObjectRef:
    """Writes a table as ``<name>-<hash>.parquet``: other rows never overwrite it, the same rows are the same object."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    data = sink.getvalue()
    return manifest.put(store, f"{name}-{hashlib.sha256(data).hexdigest()[:16]}.parquet", data)


def get_table(store: ObjectStore, ref: ObjectRef) -> pa.Table:
    """Reads and checks what `put_table` wrote. Raises NotFoundError or CorruptError."""
    return pq.read_table(pa.BufferReader(manifest.get(store, ref)))


def _key(generation: int) -> str:
    return f"{PREFIX}{generation:09d}.json"


def _generations(store: ObjectStore) -> list[int]:
    names = [info.key.removeprefix(PREFIX) for info in store.list(f"{PREFIX}0")]
    return sorted(int(name.removesuffix(".json")) for name in names if name.endswith(".json"))


def _named(body: LedgerManifest) -> set[str]:
    refs = [ref for files in body.files.values() for ref in files] + list(body.kept)
    return {ref.key for ref in refs}
