"""The shards of a part, as one Parquet file: which rows are holes, and where each array's bytes lie.

A line a shard: `shard` int32, `rows` int32, `holes` list<uint16> (rows of the shard without a sample),
`candidate_rows` and `candidate_hashes` list<uint16> (below), and for each array `<array>:size` int64 and
`<array>:sha256` binary(32). Keys follow from the names: ``parts/<part>/<array>/c/<shard>/0...``, the standard
Zarr layout.

Held-out samples are chosen by a hash of their id alone, so a sample stays on its side in every snapshot.
Candidates are the samples whose 16-bit hash lies in the lowest eighth; holding out a smaller fraction takes
those below a smaller bound, without reading the ids of the whole data set.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
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
    rows16 = pa.list_(pa.uint16())
    columns: dict[str, pa.Array] = {
        "shard": pa.array([ref.index for ref in refs], pa.int32()),
        "rows": pa.array([ref.rows for ref in refs], pa.int32()),
        "holes": pa.array([ref.holes for ref in refs], rows16),
        "candidate_rows": pa.array([[row for row, _ in ref.candidates] for ref in refs], rows16),
        "candidate_hashes": pa.array([[hash for _, hash in ref.candidates] for ref in refs], rows16),
    }
    for array in refs[0].objects if refs else ():
        objects = [ref.objects[array] for ref in refs]
        columns[f"{array}:size"] = pa.array([ref.size for ref in objects], pa.int64())
        columns[f"{array}:sha256"] = pa.array([bytes.fromhex(ref.sha256) for ref in objects], pa.binary(32))
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, compression="zstd")
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
    try:
        table = pq.read_table(io.BytesIO(data))
    except pa.ArrowException as error:
        raise CorruptError(f"the shard index of part {part} is not readable: {error}") from error
    rows = table["rows"].to_numpy()
    objects = {
        name.removesuffix(":size"): (table[name].to_numpy(), _digests(table[name.replace(":size", ":sha256")]))
        for name in table.column_names
        if name.endswith(":size")
    }
    candidates = _part_rows(table["candidate_rows"], shard_rows)
    hashes = table["candidate_hashes"].combine_chunks().flatten().to_numpy()
    return ShardIndex(
        part=part,
        rows=rows,
        holes=_part_rows(table["holes"], shard_rows),
        held_out=candidates[hashes < held_out * _HASHES],
        objects=objects,
    )


def _digests(column: pa.ChunkedArray) -> NDArray[np.uint8]:
    array = column.combine_chunks()
    values = np.frombuffer(array.buffers()[1], np.uint8)
    return values[array.offset * 32 : (array.offset + len(array)) * 32].reshape(-1, 32)


def _part_rows(column: pa.ChunkedArray, shard_rows: int) -> Ints:
    """Rows within shards to rows of the part."""
    array = column.combine_chunks()
    shards = np.repeat(np.arange(len(array)), array.value_lengths().to_numpy())
    return shards * shard_rows + array.flatten().to_numpy()


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
