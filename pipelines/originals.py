"""The original bytes of pictures, fetched from the store in few requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from starflow.objectstore import ObjectStore

#: Pictures that lie closer together than this in one object are fetched in one request, up to `SPAN_BYTES`.
GAP_BYTES, SPAN_BYTES = 2**18, 2**25


class Picture(NamedTuple):
    """Where a picture's bytes lie, and which row of the work in hand it belongs to."""

    row: int
    key: str
    offset: int
    size: int


def spans(pictures: Sequence[Picture]) -> list[list[Picture]]:
    """Groups pictures so that each group is one range of one object."""
    found: list[list[Picture]] = []
    for picture in sorted(pictures, key=lambda p: (p.key, p.offset)):
        if found:
            first, last = found[-1][0], found[-1][-1]
            near = picture.offset - (last.offset + last.size) <= GAP_BYTES
            if picture.key == first.key and near and picture.offset + picture.size - first.offset <= SPAN_BYTES:
                found[-1].append(picture)
                continue
        found.append([picture])
    return found


def fetch(store: ObjectStore, span: Sequence[Picture]) -> Iterator[tuple[Picture, bytes]]:
    """The bytes of pictures that lie together. Raises NotFoundError when their object is gone."""
    start, end = span[0].offset, max(picture.offset + picture.size for picture in span)
    data = store.read(span[0].key, start, end - start)
    for picture in span:
        yield picture, data[picture.offset - start : picture.offset - start + picture.size]
