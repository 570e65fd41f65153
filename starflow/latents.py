"""Latent arrays: Zarr v3, uncompressed, sharded along the first axis; written whole, read by memory map.

Any Zarr reader opens a part (``zarr.open_group(f"{store}/parts/{part}")``). Ours maps the shards and gathers
rows straight from the page cache, several times faster than a general reader. Latents are nearly
incompressible, so nothing is compressed; each shard ends in a checksummed index of its chunks.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from starflow.errors import CorruptError
from starflow.objectstore import ObjectStore
from starflow.shardindex import MAX_SHARD_ROWS
from starflow.snapshots import ArraySpec

#: A shard of a small part holds about this share of it, so that several workers have something to do.
SMALL_PART_SHARDS = 8
MIN_SHARD_ROWS = 16


def layout(rows: int, row_bytes: int, chunk_bytes: int, shard_bytes: int) -> tuple[int, int]:
    """(rows of a chunk, rows of a shard) for a part of `rows` rows of `row_bytes` in its largest array.

    Powers of two, by bytes for large parts; small parts get shards of about an eighth of their rows.
    """
    wanted = min(shard_bytes // row_bytes, MAX_SHARD_ROWS, max(rows // SMALL_PART_SHARDS, MIN_SHARD_ROWS))
    shard = 1 << max(wanted, 1).bit_length() - 1
    chunk = 1 << max(chunk_bytes // row_bytes, 1).bit_length() - 1
    return min(chunk, shard), shard


def write_metadata(store: ObjectStore, part: str, arrays: Mapping[str, ArraySpec], chunk: int, shard: int) -> None:
    """Writes the Zarr metadata of a part's group and arrays; writing it twice is harmless."""
    memory = MemoryStore()
    zarr.open_group(memory, mode="w")
    for name, spec in arrays.items():
        _create(memory, name, spec.shape, spec.dtype, chunk, shard)
    for key, data in _contents(memory).items():
        store.write(f"parts/{part}/{key}", data)


def encode_shard(rows: NDArray[Any], chunk: int, shard: int) -> bytes:
    """The object of one shard with at most `shard` rows, exactly as zarr-python writes it."""
    if not 0 < len(rows) <= shard:
        raise ValueError(f"{len(rows)} rows do not make a shard of {shard}")
    memory = MemoryStore()
    _create(memory, "array", rows.shape, str(rows.dtype), chunk, shard)[:] = rows
    return next(data for key, data in _contents(memory).items() if "/c/" in key)


def _create(
    memory: MemoryStore, name: str, shape: tuple[int, ...], dtype: str, chunk: int, shard: int
) -> zarr.Array[Any]:
    return zarr.create_array(
        memory,
        name=name,
        shape=shape,
        dtype=dtype,
        chunks=(chunk, *shape[1:]),
        shards=(shard, *shape[1:]),
        compressors=None,
        filters=None,
        fill_value=0,
        config={"write_empty_chunks": True},  # all-zero chunks would vanish otherwise
    )


def _contents(memory: MemoryStore) -> dict[str, bytes]:
    async def collect() -> dict[str, bytes]:
        prototype = default_buffer_prototype()
        found = {key: await memory.get(key, prototype) async for key in memory.list()}
        return {key: data.to_bytes() for key, data in found.items() if data is not None}

    return sync(collect())


def map_file(file: BinaryIO) -> mmap.mmap | bytes:
    """The content of an open file without reading it; the file may be closed afterwards."""
    empty = file.seek(0, os.SEEK_END) == 0  # an empty file cannot be mapped
    return b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class MappedShard:
    """One shard, memory-mapped; rows are copied out of the page cache, nothing else is read."""

    def __init__(self, data: mmap.mmap | bytes, spec: ArraySpec, rows: int, chunk: int, shard: int, name: str) -> None:
        """`rows` is how many of the `shard` rows are in use.

        Raises CorruptError naming `name` when the chunk index fails its checksum or points outside.
        """
        dtype = np.dtype(spec.dtype).newbyteorder("<")
        self.shape, self.chunk = spec.shape[1:], chunk
        self._row_items = int(np.prod(self.shape))
        chunk_bytes = chunk * self._row_items * dtype.itemsize
        index_bytes = shard // chunk * 16
        index, checksum = data[-index_bytes - 4 : -4], int.from_bytes(data[-4:], "little")
        if len(index) != index_bytes or google_crc32c.value(index) != checksum:
            raise CorruptError(f"shard {name} is corrupt: the checksum of its chunk index differs; restore it")
        entries = np.frombuffer(index, "<u8").reshape(-1, 2)[: -(-rows // chunk)]
        data_bytes = len(data) - index_bytes - 4
        if np.any(entries[:, 1] != chunk_bytes) or np.any(entries[:, 0] > data_bytes - chunk_bytes):
            raise CorruptError(f"shard {name} is corrupt: its index points outside of it; restore it")
        offsets = entries[:, 0].astype(np.int64)
        items = np.frombuffer(data, dtype, count=data_bytes // dtype.itemsize)
        self._items = items
        self._starts = offsets // dtype.itemsize
        # zarr-python writes chunks one after the other; then all rows are one array.
        self._rows = None
        if np.array_equal(offsets, offsets[0] + chunk_bytes * np.arange(len(offsets))):
            used = items[self._starts[0] :][: len(offsets) * chunk * self._row_items]
            self._rows = used.reshape(-1, *self.shape)

    def gather(self, rows: NDArray[np.int64], out: NDArray[Any]) -> None:
        """Copies rows (by number within the shard) into `out` (len(rows), *shape)."""
        if self._rows is not None:
            np.take(self._rows, rows, axis=0, out=out, mode="clip")
            return
        starts = self._starts[rows // self.chunk] + rows % self.chunk * self._row_items
        for position, start in enumerate(starts):
            out[position] = self._items[start : start + self._row_items].reshape(self.shape)
