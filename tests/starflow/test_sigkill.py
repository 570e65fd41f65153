"""SIGKILL of the real commands of upkeep at random moments; test_kills.py dies at every single change in turn."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from starflow.objectstore import LocalStore
from starflow.snapshots import publish
from tests.mortal_store import content, expect_intact
from tests.starflow.test_kills import gone
from tests.starflow.test_upkeep import make_part

KILLS = 10
#: Samples of each part.
COUNT = 2000
#: A takedown, compaction and two collections, the second of which drops the history.
NIGHT = (
    ("takedown", "--url", "http://host1.example/secret-17"),
    ("snapshots", "compact"),
    ("snapshots", "gc"),
    ("snapshots", "gc", "--keep", "1", "--grace-hours", "0"),
)


def start(store: Path, command: tuple[str, ...]) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-m", "starflow.cli", *command, "--store", str(store)]
    return subprocess.Popen(line, stdout=subprocess.DEVNULL, start_new_session=True)


def killed(store: Path, command: tuple[str, ...], seconds: float) -> bool:
    """Runs a command, for so long after it has first changed the store; True when it was killed."""
    before, process = fingerprint(store), start(store, command)
    while process.poll() is None and fingerprint(store) == before:
        time.sleep(0.001)
    try:
        assert process.wait(timeout=seconds) == 0
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
    return False


def fingerprint(store: Path) -> list[tuple[str, int]]:
    """Files of the store, those that are being written included."""
    return sorted((folder, len(files)) for folder, _, files in os.walk(store))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_commands_killed_at_random_moments_end_the_same(tmp_path: Path) -> None:
    prepared = LocalStore(tmp_path / "prepared")
    parts = [make_part(prepared, start, COUNT)[0] for start in (0, 10_000, 20_000)]
    first = publish(prepared, parent=None, parts=parts[:2], image_size=16)
    publish(prepared, parent=first, parts=parts, image_size=16)
    calm, seconds = tmp_path / "calm", {}
    shutil.copytree(prepared.root, calm)
    for command in NIGHT:
        started = time.monotonic()
        assert start(calm, command).wait(timeout=600) == 0
        seconds[command] = 0.3 * (time.monotonic() - started)  # most of it is its start
    expected, moments, kills, chains = content(LocalStore(calm)), random.Random(0), 0, 0
    while kills < KILLS:
        store, chains = tmp_path / f"store-{chains}", chains + 1
        shutil.copytree(prepared.root, store)
        for command in NIGHT:
            while killed(store, command, seconds[command] * moments.random()):
                kills += 1
                expect_intact(LocalStore(store))
                seconds[command] *= 1.05
            seconds[command] *= 0.7
        LocalStore(store).sweep(0)
        assert content(LocalStore(store)) == expected
        assert gone(LocalStore(store), COUNT)
        assert not [path for path in store.rglob("*~") if not path.name.endswith(".lock~")]
        print(f"{kills} kills in {chains} stores", flush=True)
