"""A machine's ranks are watched whatever the store does; `sleep` in the place of torchrun and its ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from tests.training.run_helpers import until
from training import crew as crew_module
from training.crew import Crew, End, Lookout

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.fixture
def rank(tmp_path):
    """A process whose heartbeat is that of rank 0; it ends at SIGTERM."""
    with subprocess.Popen(SLEEP) as process:
        (tmp_path / "heartbeat-0.json").write_text(json.dumps({"pid": process.pid}))
        yield process
        process.kill()


@pytest.fixture
def watched(rank, tmp_path, monkeypatch):
    """`watched(**values)` has a crew of those values watch that rank, with a look that waits for its store."""
    popen, answer, ended, threads = subprocess.Popen, threading.Event(), [], []
    looking = threading.Event()
    fake = SimpleNamespace(Popen=lambda command, **rest: popen(SLEEP, **rest))
    monkeypatch.setattr(crew_module, "subprocess", fake)

    def look():
        looking.set()
        answer.wait(200)

    def watch(**values):
        defaults = {"ranks": 1, "folder": tmp_path, "arguments": [], "loopback": True, "hang_timeout": 60.0}
        looks = {"stop": lambda: False, "look": look, "look_every": 0.01}
        crew = Crew(**(defaults | looks | values))
        threads.append(threading.Thread(target=lambda: ended.append(crew.run(tmp_path / "attempt.json"))))
        threads[0].start()

    def end():
        assert threads[0].is_alive()  # the look still waits
        answer.set()
        threads[0].join()
        return ended[0]

    watch.end, watch.looking = end, looking
    yield watch
    answer.set()


def test_a_hung_rank_is_ended_while_a_look_waits_for_the_store(rank, watched, tmp_path):
    watched(hang_timeout=2.0)
    rank.wait(timeout=60)
    assert "no sign of life" in watched.end().message


def test_a_clock_that_is_set_forward_makes_nobody_silent(rank, watched, tmp_path):
    os.utime(tmp_path / "heartbeat-0.json", (0, 0))
    looked = threading.Event()
    watched(look=looked.set, stop=looked.is_set)
    assert rank.wait(timeout=60) == -signal.SIGTERM  # asked to stop after a look, not killed before


def test_a_stop_reaches_the_ranks_while_a_look_waits_for_the_store(rank, watched):
    watched(stop=watched.looking.is_set)
    assert rank.wait(timeout=60) == -signal.SIGTERM
    watched.end()


def test_a_lookout_looks_again_and_again_and_passes_on_what_it_finds():
    looks = iter([None, None, End("failed", "alone")])
    with Lookout(lambda: next(looks), 0.01) as lookout:
        assert until(lookout.end, 30).message == "alone"


def test_a_look_that_breaks_is_not_hidden():
    def broken():
        raise ValueError("broken")

    with Lookout(broken, 0.0) as lookout, pytest.raises(ValueError, match="broken"):
        until(lookout.end, 30)
