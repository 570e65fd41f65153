import time

import pytest

from starflow.errors import StoreError
from starflow.objectstore import open_store
from training.lease import Lease, LeaseHeldError
from training.processes import identity, is_gone


def test_one_writer_until_release(tmp_path):
    store = open_store(str(tmp_path))
    first, second = Lease(store, "r", "elsewhere:1:1"), Lease(store, "r", "elsewhere:2:1")
    first.acquire()
    with pytest.raises(LeaseHeldError, match="elsewhere:1:1"):
        second.acquire()
    with pytest.raises(LeaseHeldError):
        second.check()
    first.renew()
    first.release()
    second.acquire()
    with pytest.raises(LeaseHeldError, match="elsewhere:2:1"):
        first.renew()
    first.release()
    second.check()


def test_expiry_and_dead_owners_free_the_lease(tmp_path):
    store = open_store(str(tmp_path))
    Lease(store, "r", "elsewhere:1:1", seconds=0.3).acquire()
    waited = []
    Lease(store, "r", "elsewhere:2:1").acquire(wait=5, on_wait=waited.append)
    assert len(waited) == 1
    host = identity().rsplit(":", 2)[0]
    Lease(store, "q", f"{host}:999999999:1.00", seconds=60).acquire()
    began = time.monotonic()
    Lease(store, "q", identity()).acquire()
    assert time.monotonic() - began < 1


def test_a_store_that_is_away_does_not_free_the_lease(tmp_path, monkeypatch):
    store = open_store(str(tmp_path))
    lease = Lease(store, "r", "elsewhere:1:1")
    lease.acquire()

    def away(key, *span):
        raise StoreError("away")

    monkeypatch.setattr(store, "read", away)
    for ask in (lease.check, Lease(store, "r", "elsewhere:2:1").acquire):
        with pytest.raises(StoreError, match=r"^away$"):
            ask()
    monkeypatch.undo()
    lease.check()


def test_identity():
    assert not is_gone(identity())
    assert is_gone(identity()[:-1] + "x")
    assert not is_gone("another-host:1:1.00")
