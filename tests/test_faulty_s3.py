"""The faulty proxy does what it says, in front of the real S3 server and behind the real client."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from starflow import manifest, s3store
from starflow.errors import StoreError
from starflow.objectstore import ObjectStore, open_store
from tests.faulty_s3 import FaultyS3

BIG = bytes(range(256)) * 64


@pytest.fixture
def proxy(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    with FaultyS3(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.fixture
def give_up_soon(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From when it is called, what fails is not tried for long."""

    def give_up() -> None:
        monkeypatch.setattr(s3store, "FIRST_DEADLINE_SECONDS", 1.0)
        monkeypatch.setattr(s3store, "DEADLINE_SECONDS", 1.0)

    return give_up


@pytest.fixture
def store(proxy: FaultyS3, s3_url: str) -> ObjectStore:
    return open_store(s3_url)


def test_without_a_mode_it_is_the_server(store: ObjectStore, proxy: FaultyS3) -> None:
    store.write("a", BIG)
    store.create("b", b"")
    assert store.read("a", 3, 5) == BIG[3:8]
    info = store.head("a")
    assert info is not None
    assert info.size == len(BIG)
    assert [found.key for found in store.list()] == ["a", "b"]
    store.delete(["a"])
    assert store.head("a") is None
    assert [request.partition(" ")[0] for request in proxy.requests[:2]] == ["HEAD", "PUT"]  # the bucket first


@pytest.mark.parametrize("mode", ["down", "503", "507", "denied"])
def test_writes_fail_and_work_again(
    store: ObjectStore, proxy: FaultyS3, give_up_soon: Callable[[], None], mode: str
) -> None:
    give_up_soon()
    proxy.mode = mode
    with pytest.raises(StoreError):
        store.write("a", b"1")
    assert proxy.struck
    proxy.mode = ""
    assert store.head("a") is None
    store.write("a", b"1")
    assert store.read("a") == b"1"


def test_a_full_store_can_be_read(store: ObjectStore, proxy: FaultyS3) -> None:
    store.write("a", b"1")
    proxy.mode = "507"
    assert store.read("a") == b"1"


def test_a_lost_answer_is_of_a_request_that_was_executed(store: ObjectStore, proxy: FaultyS3) -> None:
    proxy.only, proxy.count = r"^PUT .*/commit", 1
    proxy.mode = "lost"
    store.create("commit", b"ours")  # the second try meets the first one's object
    assert proxy.struck == 1
    assert proxy.mode == ""
    assert store.read("commit") == b"ours"


def test_only_so_many_after_so_many(store: ObjectStore, proxy: FaultyS3) -> None:
    store.write("a", BIG)
    proxy.only, proxy.after, proxy.count = "^GET .*/a", 1, 2
    proxy.mode = "503"
    assert [store.read("a", 0, 4) for _ in range(3)] == [BIG[:4]] * 3
    assert proxy.struck == 2
    assert sum(request.startswith("GET") for request in proxy.requests) == 5


def test_a_byte_flipped_on_the_way_down_is_noticed(
    store: ObjectStore, proxy: FaultyS3, give_up_soon: Callable[[], None]
) -> None:
    ref = manifest.put(store, "a", BIG)
    proxy.count = 1
    proxy.mode = "flip"
    assert manifest.get(store, ref) == BIG  # by the client's checksum: it reads again
    give_up_soon()
    proxy.mode = "flip"
    with pytest.raises(StoreError):
        manifest.get(store, ref)
    assert store.read("a", 0, 100) != BIG[:100]  # a range has no checksum of its own


def test_a_byte_flipped_on_the_way_up_is_refused_by_the_server(
    store: ObjectStore, proxy: FaultyS3, give_up_soon: Callable[[], None]
) -> None:
    give_up_soon()
    proxy.mode = "flip"
    with pytest.raises(StoreError):
        store.write("a", BIG)
    proxy.mode = ""
    assert store.head("a") is None


def test_a_slow_transfer_takes_its_time_and_arrives(store: ObjectStore, proxy: FaultyS3) -> None:
    proxy.rate = 20_000
    proxy.mode = "slow"
    started = time.monotonic()
    store.write("a", BIG)
    assert store.read("a") == BIG
    assert time.monotonic() - started > 1.2  # twice 16,384 bytes


def test_what_hangs_goes_on_when_the_mode_changes(store: ObjectStore, proxy: FaultyS3) -> None:
    proxy.mode = "hang"
    writer = threading.Thread(target=store.write, args=("a", b"1"))
    writer.start()
    deadline = time.monotonic() + 60
    while not proxy.struck and time.monotonic() < deadline:
        time.sleep(0.01)
    assert writer.is_alive()
    proxy.mode = ""
    writer.join(60)
    assert store.read("a") == b"1"


def test_unknown_modes_are_refused(proxy: FaultyS3) -> None:
    with pytest.raises(ValueError, match="sideways"):
        proxy.mode = "sideways"
