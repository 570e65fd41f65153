"""The commit rule: what a manifest names is checked, and newer schemas are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from starflow import manifest
from starflow.errors import AlreadyExistsError, CorruptError, StoreError
from starflow.objectstore import LocalStore


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def test_parts_are_verified(store: LocalStore, tmp_path: Path) -> None:
    ref = manifest.put(store, "part", b"hello")
    assert manifest.get(store, ref) == b"hello"
    file = tmp_path / "file"
    file.write_bytes(b"content")
    ref = manifest.upload(store, "part", file)
    manifest.download(store, ref, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"content"
    store.write("part", b"c0ntent")
    with pytest.raises(CorruptError, match="part is corrupt"):
        manifest.get(store, ref)
    (tmp_path / "copy").unlink()
    with pytest.raises(CorruptError, match="part is corrupt"):
        manifest.download(store, ref, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_one_manifest_wins(store: LocalStore) -> None:
    manifest.commit(store, "m.json", "snapshot", 1, {"a": 1})
    manifest.commit(store, "m.json", "snapshot", 1, {"a": 1})
    with pytest.raises(AlreadyExistsError, match=r"m\.json"):
        manifest.commit(store, "m.json", "snapshot", 1, {"a": 2})
    assert manifest.load(store, "m.json", "snapshot", 1) == {"a": 1}


def test_readers_refuse_what_they_do_not_know(store: LocalStore) -> None:
    manifest.commit(store, "m.json", "snapshot", 2, {})
    with pytest.raises(StoreError, match="schema version 2, this release reads up to 1"):
        manifest.load(store, "m.json", "snapshot", 1)
    with pytest.raises(StoreError, match="is a snapshot manifest, a checkpoint was expected"):
        manifest.load(store, "m.json", "checkpoint", 2)
    store.write("m.json", b"{torn")
    with pytest.raises(CorruptError, match="not a manifest"):
        manifest.load(store, "m.json", "snapshot", 1)
