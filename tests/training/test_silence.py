"""Who is silent, by a clock that the test moves."""

from __future__ import annotations

from training.silence import Silence


def watch(silent, clock, seconds, **tags):
    """Looks once a second; what it knows in the end."""
    for _ in range(seconds):
        clock.now += 1
        found = silent.look(tags)
    return found


def test_silence_is_time_without_a_change(clock):
    silent = Silence(9)
    assert watch(silent, clock, 5, a="1", b="1") == {"a": 4, "b": 4}
    assert watch(silent, clock, 1, a="2", b="1") == {"a": 0, "b": 5}
    assert watch(silent, clock, 3, b="1") == {"b": 8}
    assert watch(silent, clock, 1, a="2") == {"a": 0}


def test_time_without_a_look_does_not_count(clock):
    silent = Silence(9)
    watch(silent, clock, 5, a="1")
    clock.now += 100
    assert silent.look({"a": "1"}) == {"a": 0}
    assert watch(silent, clock, 9, a="1") == {"a": 9}


def test_who_has_fallen_silent_stays_so_until_a_change(clock):
    silent = Silence(9)
    watch(silent, clock, 12, a="1", b="1")
    clock.now += 100
    assert silent.look({"a": "1", "b": "2"}) == {"a": 111, "b": 0}
