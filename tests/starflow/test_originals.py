"""Finding the bytes that a refresh has left, through the records that the pipelines write."""

from __future__ import annotations

import pytest

from starflow import originals
from starflow.errors import NotFoundError
from starflow.objectstore import ObjectStore, open_store
from tests.starflow.fetched import write_batch


@pytest.fixture
def store(tmp_path) -> ObjectStore:
    return open_store(str(tmp_path))


def test_bytes_are_found_by_id_over_all_batches(store: ObjectStore) -> None:
    write_batch(store, "a", {"one": b"1", "two": b"22"})
    write_batch(store, "b", {"three": b"333", "two": b"22"})
    found = originals.Originals(store)
    numbers = found.find(["three", "nobody", "one", "two"])
    assert (numbers >= 0).tolist() == [True, False, True, True]
    assert [found.read(int(number)) for number in numbers[[0, 2, 3]]] == [b"333", b"1", b"22"]
    assert found.find([]).tolist() == []


def test_a_store_without_originals_finds_none_and_a_lost_tar_is_named(store: ObjectStore) -> None:
    assert originals.Originals(store).find(["one"]).tolist() == [-1]
    write_batch(store, "a", {"one": b"1"})
    found = originals.Originals(store)
    store.delete(["crawl/refreshes/000001/batches/a/images.tar"])
    with pytest.raises(NotFoundError, match=r"a/images\.tar"):
        found.read(int(found.find(["one"])[0]))
