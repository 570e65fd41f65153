"""Reads the samples of a snapshot by number, several hundred thousand times faster than one by one from S3.

A sample's ordinal counts the valid samples of its grid in the order of the snapshot's parts, so it means the
same on every machine. Shards are mapped where they lie (local store) or after one download of the whole shard
into a bounded cache on disk (S3); captions are mapped likewise, as Arrow.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from starflow import manifest
from starflow.cache import FileCache
from starflow.errors import CorruptError
from starflow.latents import MappedShard, map_file
from starflow.manifest import ObjectRef
from starflow.objectstore import LocalStore, ObjectStore
from starflow.shardindex import Ints, RowMap, ShardIndex, read_index
from starflow.snapshots import ArraySpec, Part, Snapshot, TextStates

Grid = tuple[int, int]

#: Shards mapped at a time; each takes a file descriptor, of which a process has 1,024 by default.
MAPPED_SHARDS = 384
#: Downloads under way at a time.
DOWNLOADS = 8


@dataclass(frozen=True)
class Batch:
    """Samples of one grid, row i of everything belonging to `ordinals[i]`."""

    grid: Grid
    ordinals: Ints  # (B,)
    mean: NDArray[np.float16]  # (B, C, h, w) posterior mean, scaled
    std: NDArray[np.float16]  # (B, C, h, w) posterior standard deviation, scaled
    captions: list[str]  # one drawn for each sample; "" where it has none
    text: NDArray[np.float16] | None  # (B, L, E) text states of those captions, where the snapshot stores them
    find_ids: Callable[[], list[str]]

    @property
    def ids(self) -> list[str]:
        """Stable ids of the samples, looked up when asked for."""
        return self.find_ids()


class SnapshotReader:
    """Gathers samples of one snapshot. Any number of threads and processes may share the cache folder."""

    def __init__(
        self,
        store: ObjectStore,
        snapshot: Snapshot,
        cache: FileCache | Path,
        held_out: float = 0.0,
    ) -> None:
        """Opens the training side: all samples but the fraction `held_out`, chosen by hash of their id.

        `held_out_side()` reads the others. Raises ConfigError for a fraction above 1/8.
        """
        self.store, self.snapshot = store, snapshot
        self.cache = cache if isinstance(cache, FileCache) else FileCache(cache)
        self._side = "train"
        self._pool = ThreadPoolExecutor(DOWNLOADS, thread_name_prefix="shards")
        indices = self._pool.map(lambda part: self._read_index(part, held_out), snapshot.parts)
        self._parts = [_PartReader(self, part, index) for part, index in zip(snapshot.parts, indices, strict=True)]
        self._rows = {grid: _GridRows(parts) for grid, parts in _by_grid(self._parts).items()}
        self._maps: OrderedDict[tuple[_PartReader, str, int], Future[MappedShard]] = OrderedDict()
        self._tables: dict[str, pa.Table] = {}
        self._used: set[str] = set()  # tables, since the last look
        self._lock = threading.Lock()
        self.cache.on_evict.append(self._let_go)

    def held_out_side(self) -> SnapshotReader:
        """A reader of the held-out samples; shares everything with this one."""
        other = object.__new__(SnapshotReader)
        other.__dict__.update(self.__dict__)
        other._side = "held-out"
        return other

    @property
    def counts(self) -> dict[Grid, int]:
        """Samples of each grid on this side."""
        return {grid: rows.maps[self._side].count for grid, rows in self._rows.items()}

    @property
    def grids(self) -> tuple[Grid, ...]:
        """Latent grids (height, width) of the snapshot."""
        return tuple(self._rows)

    def count(self, grid: Grid) -> int:
        """Samples of `grid` on this side."""
        return self._rows[grid].maps[self._side].count

    @property
    def text(self) -> TextStates | None:
        """A description of the stored text states, or None unless every caption has them from one encoder."""
        layers = [layer.text for part in self.snapshot.parts for layer in part.captions]
        kinds = {(text.encoder, text.spec.shape[1:], text.spec.dtype) if text else None for text in layers}
        return layers[0] if len(kinds) == 1 else None

    def gather(self, grid: Grid, ordinals: Ints, draws: NDArray[np.float64] | None = None) -> Batch:
        """Reads the samples `ordinals` (B,) of `grid`; fastest when they are ascending.

        `draws` (B,) in [0, 1) choose among a sample's captions by weight; without them it is the heaviest.
        """
        self.cache.look()
        places = list(self._places(grid, ordinals))
        spec = places[0].part.part.arrays["mean"] if places else self._rows[grid].parts[0].part.arrays["mean"]
        mean, std = (np.empty((len(ordinals), *spec.shape[1:]), np.float16) for _ in range(2))
        text_spec = self.text.spec if self.text else None
        text = np.zeros((len(ordinals), *text_spec.shape[1:]), np.float16) if text_spec else None
        captions = [""] * len(ordinals)
        self.prefetch(grid, ordinals)
        for place in places:
            place.part.gather("mean", place.rows, mean, place.slots)
            place.part.gather("std", place.rows, std, place.slots)
            layers = place.part.draw_captions(place, draws, captions)
            if text is not None:
                for layer in np.unique(layers[layers >= 0]):
                    chosen = layers == layer
                    name = place.part.text_name(int(layer))
                    place.part.gather(name, place.rows[chosen], text, place.slots[chosen])
        return Batch(grid, ordinals, mean, std, captions, text, lambda: self.ids(grid, ordinals))

    def prefetch(self, grid: Grid, ordinals: Ints) -> None:
        """Starts to open (on S3: to download) the latent shards that `gather` will need; does not wait."""
        for place in self._places(grid, ordinals):
            for shard in np.unique(place.rows // place.part.part.shard):
                for array in ("mean", "std"):
                    self.shard(place.part, array, int(shard))

    def samples(self, grid: Grid, ordinals: Ints) -> pa.Table:
        """Metadata of the samples, in order: row, id, url, width, height, phash, licence, extra."""
        tables, slots = [], [np.empty(0, np.int64)]
        for place in self._places(grid, ordinals):
            table = place.part.samples()
            tables.append(table.take(np.searchsorted(table["row"].to_numpy(), place.rows)))
            slots.append(place.slots)
        return pa.concat_tables(tables).take(np.argsort(np.concatenate(slots))) if tables else pa.table({})

    def ids(self, grid: Grid, ordinals: Ints) -> list[str]:
        """Stable ids of the samples."""
        ids: list[str] = self.samples(grid, ordinals)["id"].to_pylist() if len(ordinals) else []
        return ids

    def captions(self, grid: Grid, ordinals: Ints, origin: str | None = None) -> list[list[str]]:
        """Every caption of each sample, heaviest layer first; only those of `origin` if it is given."""
        found: list[list[str]] = [[] for _ in ordinals]
        for place in self._places(grid, ordinals):
            layers = place.part.part.captions
            wanted = [i for i, layer in enumerate(layers) if origin in (None, layer.origin)]
            for layer in sorted(wanted, key=lambda i: -place.part.weights[i]):
                for slot, text in zip(place.slots, place.part.captions(layer, place.rows), strict=True):
                    found[slot] += [text] if text else []
        return found

    def shard(self, part: _PartReader, array: str, shard: int) -> Future[MappedShard]:
        """The mapped shard, or the promise of it."""
        key = (part, array, shard)
        with self._lock:
            found = self._maps.pop(key, None)
            if found is None or (found.done() and found.exception()):
                if isinstance(self.store, LocalStore):
                    found = Future()
                    found.set_result(part.map_shard(array, shard))
                else:
                    found = self._pool.submit(part.map_shard, array, shard)
            self._maps[key] = found  # at the end: the least recently used stand first
            if len(self._maps) > MAPPED_SHARDS:
                self._maps.popitem(last=False)
        return found

    def _let_go(self) -> None:
        """Closes the maps of evicted files, so that the disk has their room and the cache its limit."""
        with self._lock:
            used = set(self._used)
            self._used.clear()  # in place: it belongs to both sides
            for name in list(self._tables):
                if not (self.cache.keep(name) if name in used else self.cache.holds(name)):
                    del self._tables[name]
            if isinstance(self.store, LocalStore):
                return  # its shards are mapped where they lie
            mapped = [key for key, found in self._maps.items() if found.done() and not found.exception()]
            for part, array, shard in mapped:
                if not self.cache.holds(part.ref(array, shard).sha256):
                    del self._maps[part, array, shard]

    def table(self, ref: ObjectRef, kind: str) -> pa.Table:
        """A Parquet object as a mapped Arrow table of one chunk, kept in the cache folder in that form."""
        name = f"{kind}-{ref.sha256}"
        found = self._tables.get(name)
        if found is None:
            found = self.cache.read(name, lambda path: _to_arrow(self.store, ref, path), _map_arrow)
            self._tables[name] = found
        self._used.add(name)
        return found

    def _places(self, grid: Grid, ordinals: Ints) -> Iterator[_Place]:
        rows = self._rows[grid]
        row_map = rows.maps[self._side]
        if len(ordinals) and not 0 <= ordinals.min() <= ordinals.max() < row_map.count:
            raise IndexError(f"ordinals {ordinals.min()} to {ordinals.max()} of {row_map.count} samples of {grid}")
        absolute = row_map.rows(ordinals)
        parts = np.searchsorted(rows.bases, absolute, side="right") - 1
        for index in np.unique(parts):
            slots = np.flatnonzero(parts == index)
            yield _Place(rows.parts[index], absolute[slots] - rows.bases[index], slots)

    def _read_index(self, part: Part, held_out: float) -> ShardIndex:
        return read_index(part.id, manifest.get(self.store, part.index), part.shard, held_out)


@dataclass(frozen=True)
class _Place:
    """Where some of a batch's samples lie: rows of one part, and their positions in the batch."""

    part: _PartReader
    rows: Ints
    slots: Ints


class _GridRows:
    """The parts of one grid as one sequence of rows, and the ordinals of either side in it."""

    def __init__(self, parts: Sequence[_PartReader]) -> None:
        self.parts = list(parts)
        lengths = [reader.part.rows for reader in parts]
        self.bases = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
        holes, held_out = (
            np.concatenate([base + rows for base, rows in zip(self.bases, found, strict=True)])
            for found in ([p.index.holes for p in parts], [p.index.held_out for p in parts])
        )
        unwanted = np.sort(np.concatenate([holes, held_out]))
        self.maps = {
            "train": RowMap(sum(lengths), unwanted=unwanted),
            "held-out": RowMap(sum(lengths), wanted=held_out),
        }


class _PartReader:
    """One part: its shards, captions and sample table, opened on first use."""

    def __init__(self, reader: SnapshotReader, part: Part, index: ShardIndex) -> None:
        self.reader, self.part, self.index = reader, part, index
        self.weights = np.array([layer.weight for layer in part.captions])
        self._text_indices: dict[str, ShardIndex] = {}

    def gather(self, array: str, rows: Ints, out: NDArray[Any], slots: Ints) -> None:
        shards = rows // self.part.shard
        for shard in np.unique(shards):
            chosen = shards == shard
            mapped = self.reader.shard(self, array, int(shard)).result()
            local, into = rows[chosen] % self.part.shard, slots[chosen]
            if into[-1] - into[0] == len(into) - 1:  # neighbours in the batch: one copy, straight to its place
                mapped.gather(local, out[into[0] : into[-1] + 1])
            else:
                scattered = np.empty((len(into), *out.shape[1:]), out.dtype)
                mapped.gather(local, scattered)
                out[into] = scattered

    def map_shard(self, array: str, shard: int) -> MappedShard:
        spec, _ = self._array(array)
        ref = self.ref(array, shard)
        rows = min(self.part.shard, self.part.rows - shard * self.part.shard)

        def read(file: BinaryIO) -> MappedShard:
            name = f"{ref.key} in {file.name}"
            return MappedShard(map_file(file), spec, rows, self.part.chunk, self.part.shard, name)

        store = self.reader.store
        if not isinstance(store, LocalStore):
            return self.reader.cache.read(ref.sha256, lambda path: manifest.download(store, ref, path), read)
        try:
            with store.path(ref.key).open("rb") as file:
                return read(file)
        except FileNotFoundError as error:
            raise CorruptError(f"{store.url}/{ref.key} is missing; restore it or use another snapshot") from error

    def ref(self, array: str, shard: int) -> ObjectRef:
        spec, index = self._array(array)
        return index.object(array, shard, len(spec.shape))

    def _array(self, array: str) -> tuple[ArraySpec, ShardIndex]:
        if array in self.part.arrays:
            return self.part.arrays[array], self.index
        text = next(layer.text for layer in self.part.captions if layer.text and layer.text.array == array)
        if array not in self._text_indices:
            data = manifest.get(self.reader.store, text.index)
            self._text_indices[array] = read_index(self.part.id, data, self.part.shard)
        return text.spec, self._text_indices[array]

    def text_name(self, layer: int) -> str:
        text = self.part.captions[layer].text
        assert text is not None  # only asked for when every layer has its text states
        return text.array

    def draw_captions(self, place: _Place, draws: NDArray[np.float64] | None, captions: list[str]) -> Ints:
        """Fills in one caption a sample; returns the layers they come from, -1 for none."""
        texts = [self.captions(layer, place.rows) for layer in range(len(self.weights))]
        if not texts:
            return np.full(len(place.rows), -1)
        present = np.array([[bool(text) for text in layer] for layer in texts])  # (layers, samples)
        weights = self.weights[:, None] * present
        if draws is None:
            layers = weights.argmax(axis=0)
        else:
            sums = weights.cumsum(axis=0)
            layers = (draws[place.slots] * sums[-1] < sums).argmax(axis=0)
        layers[weights.sum(axis=0) == 0] = -1
        for position, (slot, layer) in enumerate(zip(place.slots.tolist(), layers.tolist(), strict=True)):
            if layer >= 0:
                captions[slot] = texts[layer][position]
        return layers

    def captions(self, layer: int, rows: Ints) -> list[str | None]:
        column = self.reader.table(self.part.captions[layer].captions, "captions")["caption"].chunk(0)
        found: list[str | None] = column.take(pa.array(rows)).to_pylist()
        return found

    def samples(self) -> pa.Table:
        return self.reader.table(self.part.samples, "samples")


def _to_arrow(store: ObjectStore, ref: ObjectRef, path: Path) -> None:
    table = pq.read_table(pa.BufferReader(manifest.get(store, ref)))
    # 64-bit offsets: the strings of a part may exceed 2 GiB.
    fields = [field.with_type(pa.large_string()) if field.type == pa.string() else field for field in table.schema]
    table = table.cast(pa.schema(fields)).combine_chunks()
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def _map_arrow(file: BinaryIO) -> pa.Table:
    mapped = map_file(file)
    try:
        return pa.ipc.open_file(pa.py_buffer(mapped)).read_all()
    except (pa.ArrowInvalid, OSError) as error:  # OSError: a footer that is none
        raise CorruptError(f"{file.name} is corrupt: {error}; delete it") from error


def _by_grid(parts: Sequence[_PartReader]) -> dict[Grid, list[_PartReader]]:
    grids: dict[Grid, list[_PartReader]] = {}
    for part in parts:
        grids.setdefault(part.part.grid, []).append(part)
    return grids
