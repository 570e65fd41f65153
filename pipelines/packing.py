"""The original bytes that a crawl has fetched, in one uncompressed tar, and the table that says where each lies."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa


def pack(rows: pa.Table, outcomes: pa.Table, folder: Path) -> tuple[pa.Table, Path | None]:
    """(rows with their outcomes, tar of the original bytes in row order, or None without any).

    The same bytes are stored once. Content that was known before is marked unchanged and not stored again.
    """
    tar_path = folder / "images.tar"
    offsets: list[int | None] = []
    statuses = outcomes["status"].to_pylist()
    places: dict[str, int] = {}
    known = rows["known_id"].to_pylist()
    with _blobs(folder) as blob, _tar(tar_path, "ok" in statuses) as append:
        fields = (outcomes[name].to_pylist() for name in ("id", "format", "shard", "offset", "size"))
        for row, (content, kind, shard, offset, size) in enumerate(zip(*fields, strict=True)):
            if statuses[row] == "ok" and content == known[row]:
                statuses[row] = "unchanged"
            if statuses[row] != "ok":
                offsets.append(None)
                continue
            if content not in places:
                places[content] = append(f"{content}.{kind}", blob(shard, offset, size))
            offsets.append(places[content])
    table = rows.drop_columns(["etag", "last_modified"])
    for name in (
        "reason",
        "http",
        "retry_after",
        "etag",
        "last_modified",
        "id",
        "phash",
        "width",
        "height",
        "spread",
        "size",
    ):
        table = table.append_column(outcomes.schema.field(name), outcomes[name])
    table = table.append_column("status", pa.array(statuses, pa.string()))
    table = table.append_column("offset", pa.array(offsets, pa.int64()))
    return table.combine_chunks(), tar_path if places else None


@contextmanager
def _blobs(folder: Path) -> Iterator[Callable[[int, int, int], bytes]]:
    """A reader of the original bytes that the crawl processes left: (shard, offset, size) to bytes."""
    files: dict[int, Any] = {}

    def read(shard: int, offset: int, size: int) -> bytes:
        if shard not in files:
            files[shard] = (folder / "output" / f"{shard:05d}.bin").open("rb")
        files[shard].seek(offset)
        return bytes(files[shard].read(size))

    try:
        yield read
    finally:
        for file in files.values():
            file.close()


@contextmanager
def _tar(path: Path, needed: bool) -> Iterator[Callable[[str, bytes], int]]:
    """A writer of an uncompressed tar: (name, bytes) to the offset of the bytes. No times, no owners: the same
    members give the same file."""
    if not needed:
        yield lambda name, data: 0
        return
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:

        def append(name: str, data: bytes) -> int:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            offset = tar.offset + tarfile.BLOCKSIZE  # a short name's header is one block
            tar.addfile(member, io.BytesIO(data))
            return offset

        yield append
