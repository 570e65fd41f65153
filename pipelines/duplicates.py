"""Exact and near duplicates, against all pictures ever kept and among the new ones; the first one stays."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

#: A distance below the number of bands leaves one band equal, which is what candidates are looked up by.
BANDS, BAND_BITS = 4, 16
_PAIRS = 2**22
#: What a duplicate is dropped for: the same bytes, or nearly the same picture.
DUPLICATES = ("duplicate", "near_duplicate")


def find_duplicates(new: pa.Table, kept: Iterable[pa.Table], distance: int | None) -> np.ndarray:
    """Which rows of `new` (columns id, phash; earlier rows win) repeat a kept or an earlier picture.

    Returns (N,) int8: 0 unique, 1 the same bytes, 2 a perceptual hash within `distance` (at most 3, of 64 bits;
    None: not looked at). `kept` is read once, table by table, and never held.
    """
    ids = new["id"].combine_chunks()
    verdict = np.ones(len(new), dtype=np.int8)
    verdict[np.unique(ids.to_numpy(zero_copy_only=False), return_index=True)[1]] = 0
    hashes = new["phash"].to_numpy().view(np.uint64)
    index = _BandIndex(hashes, distance) if distance is not None else None
    for table in kept:
        verdict[pc.is_in(ids, table["id"].combine_chunks()).to_numpy(zero_copy_only=False)] = 1
        if index is not None:
            near = index.near(table["phash"].to_numpy().view(np.uint64))
            verdict[near & (verdict == 0)] = 2
    if index is not None:
        index.resolve(verdict)
    return verdict


class _BandIndex:
    """Hashes sorted by each of their four bands of 16 bits: a small distance leaves one band equal."""

    def __init__(self, hashes: np.ndarray, distance: int) -> None:
        self.hashes, self.distance = hashes, distance
        self.orders = [np.argsort(self._band(hashes, band), kind="stable") for band in range(BANDS)]
        self.sorted = [self._band(hashes, band)[order] for band, order in enumerate(self.orders)]

    @staticmethod
    def _band(hashes: np.ndarray, band: int) -> np.ndarray:
        return ((hashes >> np.uint64(BAND_BITS * band)) & np.uint64(2**BAND_BITS - 1)).astype(np.uint16)

    def near(self, others: np.ndarray) -> np.ndarray:
        """(N,) bool: which of our hashes are within the distance of one of `others`."""
        found = np.zeros(len(self.hashes), dtype=bool)
        for _, ours in self._pairs(np.unique(others)):
            found[ours] = True
        return found

    def resolve(self, verdict: np.ndarray) -> None:
        """Marks as 2 each row that is near an earlier row that is itself kept."""
        alive = np.flatnonzero(verdict == 0)
        unique, first = np.unique(self.hashes[alive], return_index=True)
        representatives = alive[first]
        repeated = np.setdiff1d(alive, representatives)
        edges = [np.stack([representatives[theirs], ours], 1) for theirs, ours in self._pairs(unique)]
        # Only pairs between representatives, earlier one first, sorted so that each later row's fate follows
        # from rows already decided.
        is_representative = np.zeros(len(self.hashes), dtype=bool)
        is_representative[representatives] = True
        pairs = np.concatenate(edges) if edges else np.empty((0, 2), dtype=np.int64)
        pairs = pairs[(pairs[:, 0] < pairs[:, 1]) & is_representative[pairs[:, 1]]]
        verdict[repeated] = 2
        for earlier, later in pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))]:
            if verdict[earlier] == 0:
                verdict[later] = 2

    def _pairs(self, others: np.ndarray) -> Iterable[tuple[np.ndarray, np.ndarray]]:
        """(positions in `others`, rows of ours) within the distance, in pieces of bounded size."""
        for band in range(BANDS):
            values = self._band(others, band)
            low = np.searchsorted(self.sorted[band], values, "left")
            counts = np.searchsorted(self.sorted[band], values, "right") - low
            ends = np.cumsum(counts)
            start = 0
            while start < len(others):
                offset = ends[start] - counts[start]
                stop = max(int(np.searchsorted(ends, offset + _PAIRS, "right")), start + 1)
                theirs = np.repeat(np.arange(start, stop), counts[start:stop])
                within = np.arange(len(theirs)) - np.repeat(
                    ends[start:stop] - counts[start:stop] - offset, counts[start:stop]
                )
                ours = self.orders[band][low[theirs] + within]
                close = np.bitwise_count(self.hashes[ours] ^ others[theirs]) <= self.distance
                yield theirs[close], ours[close]
                start = stop
