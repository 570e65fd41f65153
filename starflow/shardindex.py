"""The shards of a part, as one Parquet file: which rows are holes, and where each array's bytes lie.

A line a shard: `shard` int32, `rows` int32, `holes` list<uint16> (rows of the shard without a sample),
`candidates` binary (below: pairs of little-endian uint16, row and hash), and for each array `<array>:size` int64
and `<array>:sha256` binary(32). Keys follow from the names: ``parts/<part>/<array>/c/<shard>/0...``, the standard
Zarr layout.

Held-out samples are chosen by a hash of their id alone, so a sample stays on its side in every snapshot.
Candidates are the samples whose 16-bit hash lies in the lowest eighth; holding out a smaller fraction takes
those below a smaller bound, without reading the ids of the whole data set.
"""

from __future__ import annotations

import hashlib
import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from starflow.config import Config
from starflow.errors import ConfigError, CorruptError
from starflow.manifest import ObjectRef

#: Rows of a shard are numbered with 16 bits in the index.
MAX_SHARD_ROWS = 2**16
#: The largest fraction of samples that can be held out.
MAX_HELD_OUT = 1 / 8
_HASHES = 2**16
_LINES = 2**13

Ints = NDArray[np.int64]


class ShardRef(Config):
    """One finished shard."""

    index: int
    rows: int
    objects: dict[str, ObjectRef]
    holes: tuple[int, ...] = ()
    candidates: tuple[tuple[int, int], ...] = ()  # (row, hash), by row


def held_out_hash(id: str) -> int:
    """The 16 bits that decide whether a sample is held out."""
    return int.from_bytes(hashlib.blake2b(id.encode(), digest_size=2, person=b"held-out").digest(), "big")


def held_out_candidates(ids: Sequence[str | None]) -> tuple[tuple[int, int], ...]:
    """(row, hash) of the samples of a shard that may be held out; None marks a hole."""
    hashes = ((row, held_out_hash(id)) for row, id in enumerate(ids) if id is not None)
    return tuple((row, hash) for row, hash in hashes if hash < MAX_HELD_OUT * _HASHES)


def shard_key(part: str, array: str, shard: int, dimensions: int) -> str:
    """Zarr v3's key of a shard, for arrays sharded along their first axis only."""
    return f"parts/{part}/{array}/c/{shard}" + "/0" * (dimensions - 1)


def write_index(refs: Sequence[ShardRef]) -> bytes:
    """Parquet bytes of the index; `refs` are complete and in order."""
    if [ref.index for ref in refs] != list(range(len(refs))):
        raise ValueError(f"shards {[ref.index for ref in refs]} are not 0 to {len(refs) - 1} in order")
    columns: dict[str, pa.Array] = {
        "shard": pa.array([ref.index for ref in refs], pa.int32()),
        "rows": pa.array([ref.rows for ref in refs], pa.int32()),
        "holes": pa.array([ref.holes for ref in refs], pa.list_(pa.uint16())),
        "candidates": pa.array([np.array(ref.candidates, "<u2").tobytes() for ref in refs], pa.binary()),
    }
    for array in refs[0].objects if refs else ():
        objects = [ref.objects[array] for ref in refs]
        columns[f"{array}:size"] = pa.array([ref.size for ref in objects], pa.int64())
        columns[f"{array}:sha256"] = pa.array([bytes.fromhex(ref.sha256) for ref in objects], pa.binary(32))
    buffer = io.BytesIO()
    # Hashes do not compress; plain pages are read several times faster.
    pq.write_table(pa.table(columns), buffer, compression="none", use_dictionary=False, row_group_size=_LINES)
    return buffer.getvalue()


@dataclass(frozen=True)
class ShardIndex:
    """A part's index in memory: a few dozen bytes a shard and array."""

    part: str
    rows: NDArray[np.int32]  # (shards,)
    holes: Ints  # rows of the part without a sample, ascending
    held_out: Ints  # rows of the part that are held out, ascending
    objects: dict[str, tuple[Ints, NDArray[np.uint8]]]  # array: sizes (shards,), digests (shards, 32)

    def object(self, array: str, shard: int, dimensions: int) -> ObjectRef:
        """Where one shard of one array lies."""
        sizes, digests = self.objects[array]
        key = shard_key(self.part, array, shard, dimensions)
        return ObjectRef(key=key, size=int(sizes[shard]), sha256=digests[shard].tobytes().hex())


def read_index(part: str, data: bytes, shard_rows: int, held_out: float = 0.0) -> ShardIndex:
    """Reads an index, keeping of the candidates those within the fraction `held_out`.

    Raises ConfigError for a fraction above `MAX_HELD_OUT` and CorruptError for bytes that are no index.
    """
    if not 0 <= held_out <= MAX_HELD_OUT:
        raise ConfigError(f"held_out = {held_out}: the fraction of held-out samples is 0 to {MAX_HELD_OUT}")
    first = 0
    rows, holes, held = [], [], []
    objects: dict[str, tuple[list[Ints], list[NDArray[np.uint8]]]] = defaultdict(lambda: ([], []))
    for batch in _batches(part, data):
        shards = np.arange(first, first + len(batch)) * shard_rows
        first += len(batch)
        rows.append(batch["rows"].to_numpy().copy())
        lists = batch["holes"]
        holes.append(np.repeat(shards, lists.value_lengths().to_numpy()) + lists.flatten().to_numpy())
        pairs = np.concatenate([np.frombuffer(value.as_buffer(), "<u2") for value in batch["candidates"]])
        lengths = pc.binary_length(batch["candidates"]).to_numpy() // 4
        chosen = pairs[1::2] < held_out * _HASHES
        held.append(np.repeat(shards, lengths)[chosen] + pairs[::2][chosen])
        for name in batch.schema.names:
            if name.endswith(":size"):
                array = name.removesuffix(":size")
                objects[array][0].append(batch[name].to_numpy().copy())
                objects[array][1].append(_digests(batch[f"{array}:sha256"]))
    return ShardIndex(
        part=part,
        rows=np.concatenate(rows),
        holes=np.concatenate(holes),
        held_out=np.concatenate(held),
        objects={name: (np.concatenate(sizes), np.concatenate(sums)) for name, (sizes, sums) in objects.items()},
    )


def _batches(part: str, data: bytes) -> Iterator[pa.RecordBatch]:
    try:
        yield from pq.ParquetFile(pa.BufferReader(data)).iter_batches(batch_size=_LINES)
    except pa.ArrowException as error:
        raise CorruptError(f"the shard index of part {part} is not readable: {error}") from error


def _digests(column: pa.Array) -> NDArray[np.uint8]:
    """(shards, 32)"""
    values = np.frombuffer(column.buffers()[1], np.uint8).reshape(-1, 32)
    return values[column.offset : column.offset + len(column)].copy()


class RowMap:
    """Dense ordinals of the wanted rows of an index space of `total` rows."""

    def __init__(self, total: int, wanted: Ints | None = None, unwanted: Ints | None = None) -> None:
        """Either the wanted rows or the unwanted ones, ascending, whichever are few."""
        self._wanted = wanted
        if wanted is not None:
            self.count = len(wanted)
        else:
            skipped = unwanted if unwanted is not None else np.empty(0, np.int64)
            self.count = total - len(skipped)
            # Ordinals up to and including this one lie before the skipped row.
            self._before = skipped - np.arange(len(skipped))

    def rows(self, ordinals: Ints) -> Ints:
        """Rows of the given ordinals, which must lie in [0, count)."""
        if self._wanted is not None:
            return self._wanted[ordinals]
        return ordinals + np.searchsorted(self._before, ordinals, side="right")
