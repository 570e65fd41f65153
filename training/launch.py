"""The files through which the supervisor and its workers talk: one folder for each attempt of a run."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from starflow.config import Config
from starflow.errors import StarflowError
from training.config import TrainConfig

Outcome = Literal["completed", "preempted", "failed"]

#: Exit status of `starflow train` after a requested stop: saved, to be continued (EX_TEMPFAIL of sysexits.h).
PREEMPTED_STATUS = 75
#: Seconds between two beats, at least.
BEAT = 0.5


class Attempt(Config):
    """What a worker is told: the resolved configuration, who holds the lease, where to leave its traces."""

    config: TrainConfig
    owner: str
    folder: Path


class Report(Config):
    """How a worker ended, in its own words."""

    outcome: Outcome
    reason: str = ""
    retry: bool = True


def read_attempt(path: Path) -> Attempt:
    return Attempt.model_validate_json(path.read_text(encoding="utf-8"))


def write_attempt(attempt: Attempt) -> Path:
    """Makes the attempt's folder. Raises StarflowError when the disk does not take it."""
    path = attempt.folder / "attempt.json"
    try:
        attempt.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(attempt.model_dump_json(indent=1), encoding="utf-8")
    except OSError as error:
        raise StarflowError(
            f"cannot write to {attempt.folder}: {error.strerror or error}; free space there, or set cache= to "
            "another folder"
        ) from error
    return path


def write_report(folder: Path, rank: int, report: Report) -> None:
    unfinished = folder / f"report-{rank}~"
    unfinished.write_text(report.model_dump_json(), encoding="utf-8")
    unfinished.replace(folder / f"report-{rank}.json")


def read_reports(folder: Path) -> dict[int, Report]:
    """Reports of this machine's ranks."""
    return {
        int(path.stem.removeprefix("report-")): Report.model_validate_json(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("report-*.json"))
    }


class Heart:
    """A worker's sign of life: a file with its process id, touched at every beat."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._path = folder / f"heartbeat-{rank}.json"
        self._last = 0.0
        unfinished = folder / f"heartbeat-{rank}~"
        unfinished.write_text(json.dumps({"pid": os.getpid()}), encoding="utf-8")
        unfinished.replace(self._path)

    def beat(self) -> None:
        """Cheap enough for every step."""
        now = time.monotonic()
        if now - self._last > BEAT:
            os.utime(self._path)
            self._last = now

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Beats in a thread meanwhile: for large files from elsewhere, whose requests have deadlines of their own."""
        done = threading.Event()

        def go_on() -> None:
            while not done.wait(BEAT):
                self.beat()

        thread = threading.Thread(target=go_on, name="heart", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.beat()


def read_heartbeats(folder: Path) -> dict[int, tuple[int, str]]:
    """Rank: (process id, what each beat changes), for this machine's ranks that have begun."""
    found = {}
    for path in folder.glob("heartbeat-*.json"):
        pid = int(json.loads(path.read_text(encoding="utf-8"))["pid"])
        found[int(path.stem.removeprefix("heartbeat-"))] = (pid, str(path.stat().st_mtime_ns))
    return found
