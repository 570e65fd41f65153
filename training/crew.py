"""This machine's part of one attempt: torchrun and its ranks, watched until they are done, dead, hung or superseded."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil

from training.launch import Outcome, Report, read_heartbeats, read_reports
from training.processes import PARENT, kill_group
from training.silence import Silence

#: Seconds between looks at the ranks, and until a dead rank's peers have said what they know.
POLL, GRACE = 0.2, 2.0


@dataclass(frozen=True)
class End:
    """How an attempt ended."""

    outcome: Outcome
    message: str
    retry: bool = True


class Lookout:
    """Calls `look` in a thread, `every` seconds, so that a store that does not answer holds nobody up."""

    def __init__(self, look: Callable[[], End | None], every: float) -> None:
        self._look, self._every, self._looked = look, every, time.monotonic()
        self._thread = ThreadPoolExecutor(1, "lookout")
        self._pending: Future[End | None] | None = None

    def __enter__(self) -> Lookout:
        return self

    def __exit__(self, *_: object) -> None:
        """No look outlives the attempt."""
        self._thread.shutdown()

    def end(self) -> End | None:
        """What a look has found that is over; never waits for one."""
        if self._pending is None:
            if time.monotonic() - self._looked > self._every:
                self._pending = self._thread.submit(self._look)
        elif self._pending.done():
            done, self._pending, self._looked = self._pending, None, time.monotonic()
            return done.result()
        return None


@dataclass(frozen=True)
class Crew:
    """The ranks on this machine, which torchrun starts with `arguments` (rendezvous) and the attempt's file.

    hang_timeout: seconds of silence after which a rank is hung. look, every `look_every` seconds: what else ends the
    attempt. stop: whether the ranks are to save and leave.
    """

    ranks: int
    folder: Path
    arguments: Sequence[str]
    loopback: bool
    hang_timeout: float
    stop: Callable[[], bool]
    look: Callable[[], End | None]
    look_every: float

    def run(self, attempt: Path) -> End:
        """From torchrun's start until all its processes are gone."""
        command = [
            *(sys.executable, "-m", "training.agent", *self.arguments),
            *("--nproc-per-node", str(self.ranks), "--max-restarts", "0", "--monitor-interval", "0.2"),
            *("-m", "training.worker", str(attempt)),
        ]
        with Lookout(self.look, self.look_every) as lookout:
            torchrun = subprocess.Popen(command, env=self._environment(), start_new_session=True)
            try:
                return self._watch(torchrun, lookout)
            finally:
                end_processes(torchrun, self.folder)

    def _environment(self) -> dict[str, str]:
        threads = max(1, len(os.sched_getaffinity(0)) // self.ranks)
        return {
            "OMP_NUM_THREADS": str(threads),
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            "PYTHONUNBUFFERED": "1",
            **({"GLOO_SOCKET_IFNAME": "lo"} if self.loopback else {}),
            **os.environ,
            PARENT: str(os.getpid()),
            # With the shared store torchrun loses ranks when it is started again (c10d rendezvous).
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }

    def _watch(self, torchrun: subprocess.Popen[bytes], lookout: Lookout) -> End:
        launched, asked = time.monotonic(), 0.0
        silence = Silence(self.hang_timeout)  # the clock that files have may be set, and the machine may sleep
        while torchrun.poll() is None:
            beats, reports = read_heartbeats(self.folder), read_reports(self.folder)
            now = time.monotonic()
            if _died(beats, reports) or any(report.outcome == "failed" for report in reports.values()):
                break
            silent = silence.look({str(rank): beat for rank, (_, beat) in beats.items() if rank not in reports})
            if hung := self._hung(silent, len(beats), now - launched):
                return End("failed", hung)
            if end := lookout.end():
                return end
            if self.stop() and now - asked > 2:
                if not beats:
                    return End("failed", "stopped while starting")
                asked = now
                _ask_to_stop(beats)
            time.sleep(POLL)
        return self._judge(torchrun)

    def _hung(self, silent: Mapping[str, float], begun: int, running: float) -> str | None:
        limit = self.hang_timeout
        if hung := [rank for rank, seconds in silent.items() if seconds > limit]:
            return f"rank {', '.join(hung)} gave no sign of life for {limit:.0f} s and was stopped"
        if begun < self.ranks and running > limit:
            return f"only {begun} of {self.ranks} ranks had started after {limit:.0f} s"
        return None

    def _judge(self, torchrun: subprocess.Popen[bytes]) -> End:
        """What the reports say, once they are all there or the rest has had time to write.

        A rank that died without one is the cause; the others then only report that they lost it.
        """
        beats = read_heartbeats(self.folder)
        dead = _died(beats, read_reports(self.folder))
        if dead:
            names = ", ".join(f"rank {rank} (process {beats[rank][0]})" for rank in dead)
            return End("failed", f"{names} died without a word, as after SIGKILL")
        deadline = time.monotonic() + GRACE
        while torchrun.poll() is None and len(read_reports(self.folder)) < self.ranks:
            if time.monotonic() > deadline:
                break
            time.sleep(POLL)
        paths = sorted(self.folder.glob("report-*.json"), key=lambda path: path.stat().st_mtime)
        reports = [(p.stem.removeprefix("report-"), Report.model_validate_json(p.read_bytes())) for p in paths]
        failed = [(rank, report) for rank, report in reports if report.outcome == "failed"]
        if failed:
            final = next((item for item in failed if not item[1].retry), failed[0])
            return End("failed", f"rank {final[0]} failed: {final[1].reason}", final[1].retry)
        if len(reports) == self.ranks:
            outcome = reports[0][1].outcome
            return End(outcome, {"completed": "completed", "preempted": "saved and stopped as asked"}[outcome])
        return End("failed", f"torchrun ended with status {torchrun.returncode} before its ranks reported")


def end_processes(torchrun: subprocess.Popen[bytes], folder: Path) -> None:
    """Ends torchrun and every rank of the attempt; returns when they are gone."""
    pids = [pid for pid, _ in read_heartbeats(folder).values()] if folder.exists() else []
    family = {process for pid in pids if (process := _living(pid))}
    if torchrun.poll() is None:
        family |= set(psutil.Process(torchrun.pid).children(recursive=True))  # ranks that have no heartbeat yet, too
        kill_group(torchrun.pid)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    torchrun.wait()
    psutil.wait_procs(family, timeout=10)


def _ask_to_stop(beats: dict[int, tuple[int, str]]) -> None:
    for pid, _ in beats.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def _died(beats: dict[int, tuple[int, str]], reports: dict[int, Report]) -> list[int]:
    """Ranks that ended without a report."""
    return [rank for rank, (pid, _) in beats.items() if rank not in reports and not _living(pid)]


def _living(pid: int) -> psutil.Process | None:
    """The process, unless it has ended: torchrun may reap it at any moment."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None
