"""Garbage collection beside refreshes: what they left half-encoded, and may hold what was taken down since."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.garbage import collect
from pipelines.ledger import Ledger
from starflow.objectstore import LocalStore
from starflow.removal import take_down
from starflow.snapshots import publish
from starflow.takedowns import Takedowns
from tests.starflow.test_upkeep import make_part, name, stored_bytes


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "store")
    publish(store, parent=None, parts=[make_part(store, 0)[0]], image_size=16)
    return store


def half_encoded(store: LocalStore, refresh: int, start: int) -> tuple[str, np.ndarray]:
    """A part as a refresh killed while encoding leaves it: shards, and the plan's members; (id, latent means)."""
    part, mean, _ = make_part(store, start)
    members = pq.read_table(io.BytesIO(store.read(part.samples.key)))
    others = [info.key for info in store.list(f"parts/{part.id}/") if "/c/" not in info.key]
    store.delete(others)
    sink = io.BytesIO()
    pq.write_table(members, sink)
    store.write(f"crawl/refreshes/{refresh:06d}/encode/x/all/members/{part.id}.parquet", sink.getvalue())
    return part.id, mean


def test_half_encoded_parts_with_what_was_taken_down_go_at_once(store: LocalStore) -> None:
    Ledger(store, 1).commit(None, {}, ())  # refresh 1 has ended
    ended, _ = half_encoded(store, 1, 1000)
    hit, mean = half_encoded(store, 2, 2000)
    at_work, _ = half_encoded(store, 2, 3000)
    assert collect(store)[0].objects == 0
    take_down(store, Takedowns([("id", name(2003))]))
    garbage, scrubbed = collect(store)
    assert {f"parts/{ended}/", f"parts/{hit}/"} == set(garbage.groups)
    assert (garbage.waiting, scrubbed) == ((f"parts/{at_work}/",), 0)
    assert mean[3].tobytes() not in stored_bytes(store)
