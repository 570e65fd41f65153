"""Duplicates against a brute-force search."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from pipelines.duplicates import find_duplicates


def table(ids: list[str], hashes: np.ndarray) -> pa.Table:
    return pa.table({"id": pa.array(ids, pa.string()), "phash": hashes.astype(np.int64)})


def crowded(count: int, seed: int) -> np.ndarray:
    """Hashes around a few centres, so that many are close."""
    random = np.random.default_rng(seed)
    centres = random.integers(-(2**63), 2**63 - 1, 12)
    flips = np.zeros(count, dtype=np.uint64)
    for _ in range(4):
        flips ^= np.uint64(1) << random.integers(0, 64, count).astype(np.uint64)
    return (centres[random.integers(0, 12, count)].view(np.uint64) ^ flips).view(np.int64)


def brute_force(new: np.ndarray, kept: np.ndarray, distance: int) -> list[bool]:
    """One after the other: is a hash near one that was kept?"""
    living, result = [int(value) for value in kept.view(np.uint64)], []
    for value in new.view(np.uint64):
        near = any((int(value) ^ other).bit_count() <= distance for other in living)
        result.append(near)
        if not near:
            living.append(int(value))
    return result


@pytest.mark.parametrize("distance", [0, 1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_near_duplicates_are_those_of_a_search_one_by_one(distance: int, seed: int) -> None:
    hashes = crowded(300, seed)
    new, kept = hashes[:200], hashes[200:]
    found = find_duplicates(
        table([f"{i}" for i in range(200)], new),
        [table([f"k{i}" for i in range(50)], kept[:50]), table([f"k{i}" for i in range(50, 100)], kept[50:])],
        distance,
    )
    assert (found == 2).tolist() == brute_force(new, kept, distance)
    assert (found != 1).all()


def test_equal_bytes_are_duplicates_whatever_the_distance() -> None:
    new = table(["a", "b", "a", "c", "b"], np.arange(5) << 20)
    kept = [table(["x", "c"], np.array([7 << 40, 9 << 40]))]
    assert find_duplicates(new, kept, None).tolist() == [0, 0, 1, 1, 1]


def test_nothing_new_and_nothing_kept() -> None:
    assert find_duplicates(table([], np.array([])), [], 3).tolist() == []
    assert find_duplicates(table(["a"], np.array([5])), [table([], np.array([]))], 3).tolist() == [0]


def test_many_equal_hashes_take_no_quadratic_time() -> None:
    found = find_duplicates(table([f"{i}" for i in range(50_000)], np.zeros(50_000)), [], 3)
    assert found.tolist() == [0] + [2] * 49_999
