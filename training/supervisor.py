"""Keeps a run going: starts torchrun, watches the ranks, relaunches after deaths and hangs, cleans up always."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from starflow import manifest
from starflow.checkpoints import list_steps
from starflow.console import console
from starflow.errors import AlreadyExistsError, ConfigError, StarflowError, StoreError
from starflow.objectstore import ObjectStore, open_store
from starflow.snapshots import load_snapshot
from training.architecture import architecture, check_data
from training.cluster import Announcement, Place, announce, read_announcement
from training.config import TrainConfig
from training.events import Events
from training.launch import Attempt, Outcome, Report, read_heartbeats, read_reports, write_attempt
from training.lease import Lease, LeaseHeldError
from training.processes import identity, kill_group
from training.resume import check_same_config

#: Seconds between looks at the workers, until a dead rank's peers have said what they know, longest backoff.
POLL, GRACE, LONGEST_BACKOFF = 0.2, 2.0, 60.0
RUN_KIND, RUN_VERSION = "run", 1


@dataclass(frozen=True)
class End:
    """How an attempt ended."""

    outcome: Outcome
    message: str
    retry: bool = True


def resolve(store: ObjectStore, config: TrainConfig) -> TrainConfig:
    """Fixes the snapshot: the one the run was started with, else the configured one.

    The first call for a run checks its configuration and records it as ``runs/<run>/run.json``; another one takes
    its place as long as no step is committed and nobody holds the lease. Raises ConfigError when the model or the
    snapshot cannot be used or the run goes on with another configuration, NotFoundError without the snapshot.
    """
    if store.head(run_key(config.run)) is None:
        _record(store, _checked(store, config))
    try:
        return _adopt(store, config)
    except ConfigError:
        if not _start_anew(store, config):
            raise
    return _adopt(store, config)


def run_key(run: str) -> str:
    """Key of the run's configuration."""
    return f"runs/{run}/run.json"


def _checked(store: ObjectStore, config: TrainConfig) -> TrainConfig:
    """With its snapshot fixed, which the model fits."""
    flow = architecture(config)
    snapshot = load_snapshot(store, config.snapshot)
    check_data(flow, snapshot, config.preset)
    return config.model_copy(update={"snapshot": snapshot.id})


def _record(store: ObjectStore, config: TrainConfig) -> None:
    body = {"config": config.model_dump(mode="json")}
    with contextlib.suppress(AlreadyExistsError):  # somebody else starts it, too: theirs counts
        manifest.commit(store, run_key(config.run), RUN_KIND, RUN_VERSION, body)


def _adopt(store: ObjectStore, config: TrainConfig) -> TrainConfig:
    """The configuration on the run's snapshot. Raises ConfigError when the run has another one."""
    theirs = manifest.load(store, run_key(config.run), RUN_KIND, RUN_VERSION)["config"]
    newest = config.snapshot == "newest"
    snapshot = theirs["snapshot"] if newest else load_snapshot(store, config.snapshot).id
    check_same_config(config, theirs, f"run {config.run!r}")
    return config.model_copy(update={"snapshot": snapshot})


def _start_anew(store: ObjectStore, config: TrainConfig) -> bool:
    """Replaces the recorded configuration unless a step is committed or somebody is at work on one.

    It holds the lease meanwhile: who takes it afterwards finds the new configuration.
    """
    lease = Lease(store, config.run, identity(), config.lease_seconds)
    try:
        lease.acquire(wait=1.0)
    except LeaseHeldError:
        return False
    try:
        if list_steps(store, config.run):
            return False
        checked = _checked(store, config)
        store.delete([run_key(config.run)])
        _record(store, checked)
        return True
    finally:
        lease.release()


class Supervisor:
    """One machine's supervisor of one run."""

    def __init__(self, config: TrainConfig, place: Place | None = None) -> None:
        self.place = place or Place()
        self.local_ranks = self.place.share(config.ranks)
        self.store = open_store(config.store)
        self.config = resolve(self.store, config)
        self.lease = Lease(self.store, config.run, identity(), config.lease_seconds)
        self.events = Events(self.store, config.run)
        self._stop = threading.Event()
        self._lost: str | None = None

    def run(self) -> Outcome:
        """Trains to the end, a request to stop (SIGTERM, SIGINT) or a failure that relaunching does not cure.

        Raises LeaseHeldError when somebody else is writing the run.
        """
        if self.place.node > 0:
            return self._follow()
        self.lease.acquire(2 * self.config.lease_seconds, lambda message: self._tell("waiting", message))
        renewing = threading.Event()
        renewer = threading.Thread(target=self._renew, args=(renewing,), daemon=True)
        renewer.start()
        previous = {number: signal.signal(number, self._request_stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            _adopt(self.store, self.config)  # another start may have replaced it before the lease was ours
            outcome = self._supervise()
            self._announce(self.events.attempts, outcome)
            return outcome
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            renewing.set()
            renewer.join()
            with contextlib.suppress(StoreError):
                self.lease.release()

    def _supervise(self) -> Outcome:
        committed, failures = self._committed(), 0
        if committed is not None and committed >= self.config.steps:
            self._tell("completed", f"already complete at step {committed}", committed)
            return "completed"
        while True:
            end = self._attempt(committed)
            advanced, committed = committed, self._committed()
            if end.outcome != "failed":
                self._tell(end.outcome, end.message, committed)
                return end.outcome
            failures = 0 if committed != advanced else failures + 1
            self._tell("died", end.message, committed)
            if self._stop.is_set():
                self._tell("preempted", f"stopped before it could save; last committed step: {committed}", committed)
                return "preempted"
            if not end.retry or failures > self.config.max_restarts or self._lost:
                why = "this does not go away by itself" if not end.retry else f"{failures} relaunches in a row failed"
                self._tell("failed", self._lost or f"giving up: {why}: {end.message}", committed)
                return "failed"
            self._back_off(failures, committed)

    def _back_off(self, failures: int, committed: int | None) -> None:
        seconds = min(LONGEST_BACKOFF, 2.0 ** max(0, failures - 1)) if failures else 0.5
        where = "the beginning" if committed is None else f"step {committed}"
        self._tell("relaunch", f"relaunching from {where} in {seconds:g} s", committed)
        self._stop.wait(seconds)

    def _follow(self) -> Outcome:
        """On the other machines: takes part in each attempt that machine 0 announces, until it says how it ended."""
        previous = {number: signal.signal(number, self._request_stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            done = 0
            while True:
                news = read_announcement(self.store, self.config.run, self.place.launch)
                if news is not None and news.outcome is not None:
                    return news.outcome
                if news is not None and news.attempt > done:
                    done = news.attempt
                    end = self._launch(done)
                    console.print(f"machine {self.place.node}, attempt {done}: {end.message}", markup=False)
                elif self._stop.is_set() and not done:
                    return "preempted"
                time.sleep(POLL)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _announce(self, attempt: int, outcome: Outcome | None = None) -> None:
        if self.place.nodes > 1:
            announce(self.store, self.config.run, Announcement(self.place.launch, attempt, outcome))

    def _attempt(self, committed: int | None) -> End:
        number = self.events.attempts + 1
        where = "" if committed is None else f", resuming from step {committed}"
        message = f"attempt {number}: {self.config.ranks} ranks, ZeRO-{self.config.zero_stage}{where}"
        self.events.add("resumed" if committed is not None else "started", message, number, committed)
        self._announce(number)
        return self._launch(number)

    def _launch(self, number: int) -> End:
        """This machine's part of an attempt, from torchrun's start until all its processes are gone."""
        folder = self.config.folder / "attempts" / f"{number:04d}"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            path = write_attempt(Attempt(config=self.config, owner=self.lease.owner, folder=folder))
        except StarflowError as error:
            return End("failed", str(error), retry=False)
        command = [
            *(sys.executable, "-m", "training.agent", *self.place.torchrun(number)),
            *("--nproc-per-node", str(self.local_ranks), "--max-restarts", "0", "--monitor-interval", "0.2"),
            *("-m", "training.worker", str(path)),
        ]
        torchrun = subprocess.Popen(command, env=self._environment(), start_new_session=True)
        try:
            return self._watch(torchrun, folder, number)
        finally:
            end_processes(torchrun, folder)

    def _environment(self) -> dict[str, str]:
        threads = max(1, len(os.sched_getaffinity(0)) // self.local_ranks)
        return {
            "OMP_NUM_THREADS": str(threads),
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            "PYTHONUNBUFFERED": "1",
            **({"GLOO_SOCKET_IFNAME": "lo"} if self.place.nodes == 1 else {}),
            **os.environ,
            # With the shared store torchrun loses ranks when it is started again (c10d rendezvous).
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }

    def _watch(self, torchrun: subprocess.Popen[bytes], folder: Path, number: int) -> End:
        """Until the ranks are done, one of them is dead or hung, the lease is lost or machine 0 has moved on."""
        launched, asked, looked = time.monotonic(), 0.0, time.monotonic()
        while torchrun.poll() is None:
            beats = read_heartbeats(folder)
            reports = read_reports(folder)
            if self._lost:
                return End("failed", self._lost, retry=False)
            if _died(beats, reports) or any(report.outcome == "failed" for report in reports.values()):
                break
            hung = self._hung(beats, reports, time.monotonic() - launched)
            if hung:
                return End("failed", hung)
            if self.place.node > 0 and time.monotonic() - looked > 5:
                looked = time.monotonic()
                if self._left_behind(number):
                    return End("failed", "the other machines have gone on without this one")
            if self._stop.is_set() and time.monotonic() - asked > 2:
                asked = time.monotonic()
                if not beats:
                    return End("failed", "stopped while starting")
                for pid, _ in beats.values():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGTERM)
            time.sleep(POLL)
        return self._judge(torchrun, folder)

    def _left_behind(self, number: int) -> bool:
        news = read_announcement(self.store, self.config.run, self.place.launch)
        return news is not None and (news.attempt > number or news.outcome == "failed")

    def _hung(self, beats: dict[int, tuple[int, float]], reports: dict[int, Report], running: float) -> str | None:
        limit = self.config.hang_timeout
        silent = [rank for rank, (_, silence) in beats.items() if silence > limit and rank not in reports]
        if silent:
            return f"rank {', '.join(map(str, silent))} gave no sign of life for {limit:.0f} s and was stopped"
        if len(beats) < self.local_ranks and running > limit:
            return f"only {len(beats)} of {self.local_ranks} ranks had started after {limit:.0f} s"
        return None

    def _judge(self, torchrun: subprocess.Popen[bytes], folder: Path) -> End:
        """What the reports say, once they are all there or the rest has had time to write.

        A rank that died without one is the cause; the others then only report that they lost it.
        """
        beats = read_heartbeats(folder)
        dead = _died(beats, read_reports(folder))
        if dead:
            names = ", ".join(f"rank {rank} (process {beats[rank][0]})" for rank in dead)
            return End("failed", f"{names} died without a word, as after SIGKILL")
        deadline = time.monotonic() + GRACE
        while torchrun.poll() is None and len(read_reports(folder)) < self.local_ranks:
            if time.monotonic() > deadline:
                break
            time.sleep(POLL)
        paths = sorted(folder.glob("report-*.json"), key=lambda path: path.stat().st_mtime)
        reports = [(p.stem.removeprefix("report-"), Report.model_validate_json(p.read_bytes())) for p in paths]
        failed = [(rank, report) for rank, report in reports if report.outcome == "failed"]
        if failed:
            final = next((item for item in failed if not item[1].retry), failed[0])
            return End("failed", f"rank {final[0]} failed: {final[1].reason}", final[1].retry)
        if len(reports) == self.local_ranks:
            outcome = reports[0][1].outcome
            return End(outcome, {"completed": "completed", "preempted": "saved and stopped as asked"}[outcome])
        return End("failed", f"torchrun ended with status {torchrun.returncode} before its ranks reported")

    def _renew(self, done: threading.Event) -> None:
        while not done.wait(self.config.lease_seconds / 3):
            try:
                self.lease.renew()
            except LeaseHeldError as error:
                self._lost = str(error)
                return
            except StarflowError:
                continue  # the store is away: whoever commits asks for the lease again anyway

    def _committed(self) -> int | None:
        steps = list_steps(self.store, self.config.run)
        return steps[-1] if steps else None

    def _request_stop(self, number: int, frame: object) -> None:
        if self._stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait for the save
        self._stop.set()

    def _tell(self, kind: str, message: str, committed: int | None = None) -> None:
        self.events.add(kind, message, max(1, self.events.attempts), committed)


def end_processes(torchrun: subprocess.Popen[bytes], folder: Path) -> None:
    """Ends torchrun and every rank of the attempt; returns when they are gone."""
    pids = [pid for pid, _ in read_heartbeats(folder).values()] if folder.exists() else []
    workers = [psutil.Process(pid) for pid in pids if _alive(pid)]
    if torchrun.poll() is None:
        kill_group(torchrun.pid)
    for worker in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()
    torchrun.wait()
    psutil.wait_procs(workers, timeout=10)


def _died(beats: dict[int, tuple[int, float]], reports: dict[int, Report]) -> list[int]:
    """Ranks that ended without a report."""
    return [rank for rank, (pid, _) in beats.items() if rank not in reports and not _alive(pid)]


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
