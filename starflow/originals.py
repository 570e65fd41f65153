"""Original bytes of a snapshot's pictures, as long as the store keeps them: uncompressed tars that refreshes have left.

Every batch of a refresh commits a record of its samples, ``crawl/refreshes/.../filter.json``, whose table says for
each id where its bytes lie (tar, offset, size). Takedowns remove rows and overwrite bytes; a store may also have been
relieved of its tars altogether: latents do not need them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from starflow import manifest
from starflow.manifest import ObjectRef
from starflow.objectstore import ObjectStore

PREFIX, RECORD = "crawl/refreshes/", "/filter.json"
KIND, VERSION = "FilterRecord", 1
PLACES = pa.schema([("id", pa.string()), ("key", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])


class Originals:
    """Where the bytes of each id lie."""

    def __init__(self, store: ObjectStore) -> None:
        """Reads every sample table of the store. Bytes that two refreshes fetched are listed once."""
        self.store = store
        tables = [_places(store, info.key) for info in store.list(PREFIX) if info.key.endswith(RECORD)]
        self._table = pa.concat_tables([PLACES.empty_table(), *tables]).combine_chunks()

    def find(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """The number (N,) to give `read` for each id; -1 where the store has no bytes of it."""
        found = pc.index_in(pa.array(ids, pa.string()), value_set=self._table["id"])
        return found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)

    def read(self, number: int) -> bytes:
        """The picture's bytes as they were fetched. Raises NotFoundError when their tar is gone."""
        key, offset, size = (self._table[name][number].as_py() for name in ("key", "offset", "size"))
        return self.store.read(key, offset, size)


def _places(store: ObjectStore, key: str) -> pa.Table:
    ref = ObjectRef.model_validate(manifest.load(store, key, KIND, VERSION)["samples"])
    # Not checked against the record's hash: a takedown removes rows in place.
    table = pq.read_table(pa.BufferReader(store.read(ref.key)), columns=["id", "image"])
    image = table["image"].combine_chunks()
    columns = [table["id"], *(image.field(name) for name in ("key", "offset", "size"))]
    return pa.table(columns, names=PLACES.names).cast(PLACES)
