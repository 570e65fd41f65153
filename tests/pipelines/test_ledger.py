"""The ledger: newest row per key, immutable files, merged and pruned, one winner."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.ledger import PREFIX, SCHEMA, Ledger, Spill, newest, partition_of
from starflow.errors import AlreadyExistsError, CorruptError
from starflow.objectstore import LocalStore
from starflow.urls import url_key

NOW = datetime(2026, 1, 1, tzinfo=UTC)
PARTITIONS = 4


def rows(urls: list[str], status: str = "ok") -> pa.Table:
    records = [{"key": url_key(url), "url": url, "status": status, "last_seen": NOW} for url in urls]
    return pa.Table.from_pylist(records, SCHEMA)


def add(store: LocalStore, table: pa.Table, snapshot: str | None = None) -> Ledger:
    ledger = Ledger(store, PARTITIONS)
    owners = partition_of(table["key"].to_pylist(), ledger.partitions)
    files = {int(p): ledger.write(int(p), table.filter(pa.array(owners == p))) for p in sorted(set(owners.tolist()))}
    ledger.commit(snapshot, files, ledger.manifest.kept)
    return Ledger(store, PARTITIONS)


def everything(ledger: Ledger) -> dict[str, str]:
    tables = [ledger.read(partition) for partition in range(ledger.partitions)]
    return {row["url"]: row["status"] for table in tables for row in table.to_pylist()}


def test_the_newest_row_of_a_key_counts_over_many_generations(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    expected: dict[str, str] = {}
    for generation in range(20):
        urls = [f"http://a.example/{(generation * 7 + i) % 30}" for i in range(10)]
        ledger = add(store, rows(urls, f"status-{generation}"), f"snapshot-{generation}")
        expected |= dict.fromkeys(urls, f"status-{generation}")
        assert everything(ledger) == expected
    assert ledger.generation == 20
    assert ledger.manifest.snapshot == "snapshot-19"
    files = [info.key for info in store.list(f"{PREFIX}files/")]
    assert len(files) < 20 * PARTITIONS, "files are merged, and those no recent manifest names are deleted"
    assert len([info for info in store.list(f"{PREFIX}0")]) == 3


def test_of_two_commits_of_a_generation_one_wins(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    first, second = Ledger(store, PARTITIONS), Ledger(store, PARTITIONS)
    first.commit("a", {0: first.write(0, rows(["http://a.example/1"]))}, ())
    with pytest.raises(AlreadyExistsError, match="another refresh"):
        second.commit("b", {0: second.write(0, rows(["http://a.example/2"]))}, ())
    assert Ledger(store, PARTITIONS).manifest.snapshot == "a"


def test_the_first_refresh_fixes_the_partitions(tmp_path: Path) -> None:
    add(LocalStore(tmp_path), rows(["http://a.example/1"]))
    assert Ledger(LocalStore(tmp_path), 99).partitions == PARTITIONS


def test_a_damaged_file_is_found(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    ledger = add(store, rows(["http://a.example/1"]))
    (partition,) = ledger.manifest.files
    key = ledger.manifest.files[partition][0].key
    store.write(key, store.read(key)[:-1] + b"x")
    with pytest.raises(CorruptError, match="corrupt"):
        ledger.read(partition)


def test_newest_keeps_last_rows_in_order() -> None:
    table = pa.table({"key": ["a", "b", "a", "c"], "n": [1, 2, 3, 4]})
    assert newest(table)["n"].to_pylist() == [2, 3, 4]


def test_a_spill_gives_rows_back_by_partition_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.ledger._SPILL_ROWS", 16)
    spill = Spill(tmp_path / "spill", PARTITIONS)
    keys = [url_key(f"http://a.example/{i}") for i in range(100)]
    for first in range(0, 100, 9):
        part = list(range(first, min(first + 9, 100)))
        spill.add(pa.table({"key": [keys[i] for i in part], "n": part}))
    found = dict(spill.read())
    assert sorted(n for table in found.values() for n in table["n"].to_pylist()) == list(range(100))
    for partition, table in found.items():
        assert table["n"].to_pylist() == sorted(table["n"].to_pylist())
        assert set(partition_of(table["key"].to_pylist(), PARTITIONS).tolist()) == {partition}
