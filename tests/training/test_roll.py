"""Which machines are there, and that a store that is away takes none of them away."""

from __future__ import annotations

import os

import pytest

from starflow.errors import UnavailableError
from starflow.objectstore import open_store
from tests.faulty_s3 import FaultyS3, impatient
from training.cluster import Place
from training.lease import Lease
from training.processes import identity
from training.roll import Ended, Roll

SECONDS = 30.0


def roll(store, node):
    owner = identity() if node == 0 else f"elsewhere:{node}:1"
    return Roll(store, "r", Place(nodes=2, node=node, launch="one"), owner, SECONDS, on_stop=lambda: None)


def watch(clock, mine, seconds):
    """Looks and beats every five seconds, as the roll's own thread does; who is there in the end."""
    for _ in range(seconds // 5):
        clock.now += 5
        mine._beat()
        there = sorted(mine.look())
    return there


def test_a_machine_is_there_until_it_falls_silent_or_leaves(tmp_path, clock):
    store = open_store(str(tmp_path))
    mine, other = roll(store, 0), roll(store, 1)
    mine._beat()
    assert sorted(mine.look()) == [0]
    other._beat()
    assert watch(clock, mine, 30) == [0, 1]
    other.say(Ended(attempt=1, message="it broke", retry=True))
    assert mine.look()[1].ended.message == "it broke"
    assert watch(clock, mine, 25) == [0, 1]
    assert watch(clock, mine, 5) == [0]
    other._beat()
    assert watch(clock, mine, 5) == [0, 1]
    with other:
        pass
    assert watch(clock, mine, 5) == [0]


@pytest.mark.parametrize("mode", ["down", "hang"])
def test_a_store_that_is_away_longer_than_the_lease_ends_nothing(s3_url, monkeypatch, clock, mode):
    with FaultyS3(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        store = open_store(s3_url, patience=60.0)
        mine, other = roll(store, 0), roll(store, 1)
        lease = Lease(store, "r", "elsewhere:1:1", SECONDS)
        lease.acquire()
        follower = Lease(store, "r", identity(), SECONDS)
        other._beat()
        assert watch(clock, mine, 10) == [0, 1]
        assert not follower.is_free()
        proxy.mode = mode
        for ask in (mine.look, follower.is_free, lease.renew):
            with impatient(store), pytest.raises(UnavailableError):
                ask()
        clock.now += 4 * SECONDS
        proxy.mode = ""
        assert sorted(mine.look()) == [0, 1]  # the other one has had no more of a chance than this one
        assert not follower.is_free()
        assert watch(clock, mine, 25) == [0, 1]
        assert watch(clock, mine, 10) == [0]  # it has not come back


def test_who_leads_is_gone_when_silent(tmp_path, clock):
    store = open_store(str(tmp_path))
    Lease(store, "r", "elsewhere:1:1", SECONDS).acquire()
    follower = Lease(store, "r", identity(), SECONDS)
    for _ in range(6):
        assert not follower.is_free()
        clock.now += 5
    assert follower.is_free()
    follower.acquire()
