"""A local store whose process dies at its n-th change, and what two stores have in common when they hold the same."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from starflow.objectstore import LocalStore
from starflow.snapshots import load_snapshot, snapshot_numbers
from starflow.upkeep import MARKS, verify


class KilledError(BaseException):
    """Stands for SIGKILL: nothing in the code under test catches it."""


class MortalStore(LocalStore):
    """Dies before its change number `dies_at`, from 0; once dead, nothing more happens. `changes` counts them."""

    def __init__(self, root: Path, dies_at: int) -> None:
        super().__init__(root)
        self.dies_at, self.changes = dies_at, 0

    def _live(self) -> None:
        if self.changes >= self.dies_at:
            raise KilledError
        self.changes += 1

    def write(self, key: str, data: bytes | memoryview) -> None:
        self._live()
        super().write(key, data)

    def create(self, key: str, data: bytes) -> None:
        self._live()
        super().create(key, data)

    def upload(self, key: str, path: Path) -> None:
        self._live()
        super().upload(key, path)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._live()
            super().delete([key])


def content(store: LocalStore) -> dict[str, Any]:
    """Every object by key, without the times at which snapshots were published and garbage was found."""
    found: dict[str, Any] = {}
    for info in store.list():
        data: Any = store.read(info.key)
        if info.key.startswith("snapshots/"):
            data = json.loads(data) | {"created": None}
        elif info.key == MARKS:
            data = sorted(json.loads(data))
        elif info.key.endswith(".parquet"):
            data = pq.read_table(io.BytesIO(data)).to_pylist()
        found[info.key] = data
    return found


def die_everywhere(folder: Path, prepared: LocalStore, work: Callable[[LocalStore], object]) -> int:
    """Does `work` on copies of `prepared`, killed before each of its changes in turn, and then once more.

    Asserts that at no moment a published snapshot misses anything, and that all ends as undisturbed. Returns the
    number of kills.
    """
    calm = _copy(prepared, folder / "calm")
    work(calm)
    expected, killed = content(calm), 0
    while True:
        store = _copy(prepared, folder / f"killed-{killed}")
        mortal = MortalStore(store.root, killed)
        try:
            work(mortal)
        except KilledError:
            expect_intact(store)
            work(store)
            expect_intact(store)
            assert content(store) == expected, f"killed before change {killed}"
            shutil.rmtree(store.root)
            killed += 1
        else:
            return killed


def expect_intact(store: LocalStore) -> None:
    """Every published snapshot has all its bytes."""
    for number in snapshot_numbers(store):
        assert verify(store, load_snapshot(store, str(number)), read=True) == []


def _copy(store: LocalStore, root: Path) -> LocalStore:
    shutil.copytree(store.root, root)
    return LocalStore(root)
