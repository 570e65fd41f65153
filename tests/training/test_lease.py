"""One writer, and what becomes of the one that was superseded."""

from __future__ import annotations

import threading
import time

import pytest

from starflow.errors import StoreError
from starflow.objectstore import open_store
from training import lease as lease_module
from training.lease import Announced, Lease, LeaseHeldError
from training.processes import identity, is_gone


@pytest.fixture
def whole_clock(clock, monkeypatch):
    """`clock`, by which leases tell the time and wait, too."""
    clock.time, clock.sleep = clock.monotonic, lambda seconds: setattr(clock, "now", clock.now + seconds)
    monkeypatch.setattr(lease_module, "time", clock)
    return clock


def test_one_writer_until_release(tmp_path):
    store = open_store(str(tmp_path))
    first, second = Lease(store, "r", "elsewhere:1:1"), Lease(store, "r", "elsewhere:2:1")
    first.acquire()
    with pytest.raises(LeaseHeldError, match="process 1 on elsewhere"):
        second.acquire()
    with pytest.raises(LeaseHeldError):
        second.check()
    first.renew()
    first.release()
    second.acquire()
    with pytest.raises(LeaseHeldError, match="process 2 on elsewhere"):
        first.renew()
    first.release()
    second.check()


def test_silence_and_dead_owners_free_the_lease(tmp_path):
    store = open_store(str(tmp_path))
    Lease(store, "r", "elsewhere:1:1", seconds=0.6).acquire()
    waited = []
    began = time.monotonic()
    Lease(store, "r", "elsewhere:2:1").acquire(wait=True, on_wait=waited.append)
    assert time.monotonic() - began >= 0.6
    assert len(waited) == 1
    host = identity().rsplit(":", 2)[0]
    Lease(store, "q", f"{host}:999999999:1.00", seconds=60).acquire()
    Lease(store, "q", identity()).acquire()


@pytest.mark.parametrize("off", [-600.0, 600.0])
def test_clocks_do_not_matter(tmp_path, monkeypatch, whole_clock, off):
    """The owner's clock is ten minutes off: only its silence frees the lease, and it does."""
    store, clock = open_store(str(tmp_path)), whole_clock
    owner, other = (Lease(store, "r", f"elsewhere:{n}:1", seconds=30) for n in (1, 2))

    def renew(call):
        with monkeypatch.context() as patch:
            patch.setattr(clock, "time", lambda: clock.now + off)
            call()

    renew(owner.acquire)
    for _ in range(8):
        assert not other.is_free()
        clock.now += 5
        renew(owner.renew)
    with pytest.raises(LeaseHeldError):
        other.acquire()
    silent = clock.now
    other.acquire(wait=True)
    assert 30 <= clock.now - silent < 32


def test_who_has_a_short_lease_waits_for_a_long_one_to_fall_silent(tmp_path, whole_clock):
    store, clock = open_store(str(tmp_path)), whole_clock
    Lease(store, "r", "elsewhere:1:1", seconds=600).acquire()
    began = clock.now
    Lease(store, "r", "elsewhere:2:1", seconds=5).acquire(wait=True)
    assert 600 <= clock.now - began < 610


def test_a_machine_that_stalls_still_waits_for_the_silence(tmp_path, whole_clock, monkeypatch):
    store, clock, stalls = open_store(str(tmp_path)), whole_clock, [40, 40]
    Lease(store, "r", "elsewhere:1:1", seconds=30).acquire()

    def sleep(seconds):
        clock.now += stalls.pop() if stalls else seconds

    monkeypatch.setattr(clock, "sleep", sleep)
    Lease(store, "r", "elsewhere:2:1", seconds=30).acquire(wait=True)
    assert not stalls


def test_who_has_a_short_lease_does_not_take_an_outage_for_the_silence_of_a_long_one(tmp_path, clock):
    store = open_store(str(tmp_path))
    Lease(store, "r", "elsewhere:1:1", seconds=30).acquire()
    other = Lease(store, "r", "elsewhere:2:1", seconds=5)
    for seconds in (*8 * [1], 30, *29 * [1]):
        clock.now += seconds
        assert not other.is_free()
    clock.now += 1
    assert other.is_free()


def test_a_lease_that_expired_long_ago_is_free_at_once(tmp_path, monkeypatch):
    store = open_store(str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(lease_module.time, "time", lambda now=time.time: now() - 3600)
        Lease(store, "r", "elsewhere:1:1", seconds=600).acquire()
    Lease(store, "r", "elsewhere:2:1").acquire()


def test_who_has_seen_the_lease_held_waits_for_silence_however_long_the_store_was_away(tmp_path, monkeypatch):
    store = open_store(str(tmp_path))
    Lease(store, "r", "elsewhere:1:1").acquire()
    follower = Lease(store, "r", "elsewhere:2:1")
    monkeypatch.setattr(lease_module.time, "time", lambda now=time.time: now() + 7200)
    assert not follower.is_free()


def test_a_late_owner_neither_releases_nor_renews(tmp_path):
    """Another writer has taken over, and has left meanwhile: nothing is the late one's any more."""
    store = open_store(str(tmp_path))
    late, other = Lease(store, "r", "elsewhere:1:1", seconds=0.3), Lease(store, "r", "elsewhere:2:1")
    late.acquire()
    other.acquire(wait=True)
    late.release()
    other.check()
    other.release()
    with pytest.raises(LeaseHeldError, match="taken over by nobody"):
        late.renew()
    assert other.holder() is None


def test_a_release_that_another_one_overtakes_does_nothing(tmp_path, monkeypatch):
    store = open_store(str(tmp_path))
    late, other = Lease(store, "r", "elsewhere:1:1", seconds=0.3), Lease(store, "r", "elsewhere:2:1")
    late.acquire()
    replace = store.replace

    def overtaken(*arguments):
        monkeypatch.undo()
        other.acquire(wait=True)
        replace(*arguments)

    monkeypatch.setattr(store, "replace", overtaken)
    late.release()
    other.check()


class Killed(BaseException):
    """The writer goes no further, for now or for good."""


def paused(lease, monkeypatch, request, *, done=False):
    """`lease` commits "m"; its writer pauses just before that request to the store, or just after it is `done`."""
    call = getattr(lease.store, request)

    def pause(key, *rest):
        if request == "create" and key != "m":
            return call(key, *rest)
        if done:
            call(key, *rest)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(lease.store, request, pause)
        with pytest.raises(Killed):
            lease.commit("m", "drafts/1", b"by the first")


def test_a_writer_that_lost_the_lease_before_it_announced_commits_nothing(tmp_path, monkeypatch):
    store = open_store(str(tmp_path))
    first, second = Lease(store, "r", "elsewhere:1:1", seconds=0.3), Lease(store, "r", "elsewhere:2:1")
    first.acquire()
    paused(first, monkeypatch, "write", done=True)
    second.acquire(wait=True)
    assert store.head("m") is None
    with pytest.raises(LeaseHeldError, match="process 2 on elsewhere"):  # it wakes, and goes on where it was
        first._announce(Announced(key="m", draft="drafts/1"))
    second.commit("m", "drafts/2", b"by the second")
    assert store.read("m") == b"by the second"


@pytest.mark.parametrize("request_", ["replace", "create"])
def test_a_checkpoint_that_was_announced_is_its_successors_too(tmp_path, monkeypatch, request_):
    """The late writer's manifest is there before its successor looks where to go on, however late it creates it."""
    store = open_store(str(tmp_path))
    first, second = Lease(store, "r", "elsewhere:1:1", seconds=0.3), Lease(store, "r", "elsewhere:2:1")
    first.acquire()
    paused(first, monkeypatch, request_, done=request_ == "replace")
    assert store.head("m") is None
    second.acquire(wait=True)
    assert store.read("m") == b"by the first"
    store.create("m", b"by the first")  # the late writer wakes: no harm done
    assert not list(store.list("drafts/"))
    assert second.settle() is None
    second.commit("n", "drafts/2", b"by the second")
    assert store.read("n") == b"by the second"


def test_a_commit_whose_answer_was_lost_is_done_once(tmp_path, monkeypatch):
    store = open_store(str(tmp_path))
    lease = Lease(store, "r", "elsewhere:1:1")
    lease.acquire()
    paused(lease, monkeypatch, "create", done=True)
    lease.renew()  # what is announced stays so
    lease.commit("m", "drafts/1", b"by the first, at another time")
    assert store.read("m") == b"by the first"
    lease.release()
    with pytest.raises(LeaseHeldError):
        lease.commit("n", "drafts/2", b"x")


def test_renewals_and_commits_do_not_disturb_each_other(tmp_path):
    store = open_store(str(tmp_path))
    lease, uploader = Lease(store, "r", "elsewhere:1:1"), Lease(store, "r", "elsewhere:1:1")
    lease.acquire()
    done = threading.Event()

    def renew():
        while not done.wait(0.001):  # or the commits, which begin anew after each renewal, could take for ever
            lease.renew()

    thread = threading.Thread(target=renew)
    thread.start()
    for number in range(20):
        uploader.commit(f"m{number}", f"drafts/{number}", b"%d" % number)
    done.set()
    thread.join()
    assert len(list(store.list("m"))) == 20


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
