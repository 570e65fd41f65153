"""Read a snapshot's latents twice: with nothing but zarr and pyarrow, and with SnapshotReader, which is faster.

    python examples/read_snapshot.py STORE          # a folder; for s3:// stores the second way works as it is

Prints a line for each, and fails if they do not agree.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import zarr

from starflow.objectstore import open_store
from starflow.reader import SnapshotReader
from starflow.snapshots import load_snapshot


def plain(store: Path) -> dict[str, np.ndarray]:
    """Sample id to latent mean, (C, h, w) float16, by what lies in the store: manifest, part list, arrays, tables."""
    newest = json.loads(max((store / "snapshots").glob("*.json")).read_text())
    listed = json.loads((store / newest["part_list"]["key"]).read_text())
    found = {}
    for part in listed:
        group = zarr.open_group(store / "parts" / part["id"], mode="r")
        samples = pq.read_table(store / "parts" / part["id"] / "samples.parquet")
        means = group["mean"][:]
        for row, name in zip(samples["row"].to_pylist(), samples["id"].to_pylist(), strict=True):
            found[name] = means[row]  # rows that no sample names are holes
    return found


def fast(url: str, cache: Path) -> dict[str, np.ndarray]:
    """The same through the reader that training uses: by latent shape, in batches, from the page cache."""
    store = open_store(url)
    reader = SnapshotReader(store, load_snapshot(store, "newest"), cache)
    found = {}
    for grid in reader.grids:
        for first in range(0, reader.count(grid), 256):
            batch = reader.gather(grid, np.arange(first, min(first + 256, reader.count(grid))))
            found.update(zip(batch.ids, batch.mean, strict=True))
    return found


def main() -> None:
    url = sys.argv[1]
    one = plain(Path(url))
    with tempfile.TemporaryDirectory() as cache:
        two = fast(url, Path(cache))
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)
    some = next(iter(one.values()))
    print(f"{len(one)} samples of shape {some.shape} {some.dtype}, read twice, all equal")


if __name__ == "__main__":
    main()
