"""Keeps a run going: starts torchrun, watches the ranks, relaunches after deaths and hangs, cleans up always.

On several machines each has a supervisor. Whoever holds the lease leads; see training/cluster.py.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from starflow.checkpoints import list_steps
from starflow.console import console
from starflow.errors import StarflowError, StoreError, UnavailableError
from starflow.objectstore import open_store
from training.cluster import Announcement, Place, announce, free_port, read_announcement, with_ranks
from training.config import TrainConfig
from training.crew import POLL, Crew, End
from training.events import Events
from training.launch import Attempt, Outcome, write_attempt
from training.lease import Lease, LeaseHeldError
from training.processes import identity
from training.record import adopt, resolve
from training.roll import Ended, Member, Roll
from training.spot import watch_notices

#: Longest backoff; how often followers look for news; how long machines other than 0 let it lead, in seconds.
LONGEST_BACKOFF, FOLLOW_POLL, HEAD_START = 60.0, 0.5, 10.0
#: How long a store may be away between attempts, in seconds.
STORE_AWAY = 120.0

T = TypeVar("T")


class Supervisor:
    """One machine's supervisor of one run."""

    def __init__(self, config: TrainConfig, place: Place | None = None) -> None:
        self.place = place or Place()
        self.ranks_per_node = self.place.share(config.ranks)
        self.store = open_store(config.store)
        self.config = resolve(self.store, config)
        self.owner = identity()
        # A sign of life that waits for the store, and then for its turn, comes too late.
        self.quick = open_store(config.store, patience=config.lease_seconds / 3)
        self.lease = Lease(self.quick, config.run, self.owner, config.lease_seconds)
        self._stop, self._regroup = threading.Event(), threading.Event()
        self.roll = Roll(self.quick, config.run, self.place, self.owner, config.lease_seconds, self._stop.set)
        #: Whether the launch was ended for good, so that no scheduler should resume it.
        self.told_to_end = False
        self._lost: str | None = None
        self._notice = ""

    def run(self) -> Outcome:
        """Trains to the end, a request to stop (SIGTERM, SIGINT) or a failure that relaunching does not cure.

        Raises LeaseHeldError when another launch is writing the run.
        """
        roll = self.roll if self.place.launch else contextlib.nullcontext()
        with self._signals(), watch_notices(self._notified), roll:
            try:
                outcome = self._lead_alone() if self.place.nodes == 1 else self._take_part()
                self.told_to_end = outcome == "preempted" and self.roll.stop_asked
            except (UnavailableError, LeaseHeldError):
                if not self._stop.is_set():
                    raise
                return "preempted"  # a stop waits neither for the store nor for who writes the run
            return outcome

    def _lead_alone(self) -> Outcome:
        self.events = Events(self.store, self.config.run)
        self._patiently(
            lambda: self.lease.acquire(True, lambda message: self._tell("waiting", message), self._stop.is_set)
        )
        return self._lead() or "failed"

    def _take_part(self) -> Outcome:
        """Leads when the lease is free; else takes part in what the leader announces, until it says how it ended."""
        began, done, tried, foreign = time.monotonic(), 0, 0.0, 0.0
        while not self._stop.is_set():
            news = self._patiently(self._news)
            if news and news.outcome:
                return news.outcome
            now = time.monotonic()
            if news and news.attempt > done and self.owner in news.members[1:]:  # its own, as the first, is over
                done = news.attempt
                self._follow(news)
            elif now - tried > 2 * FOLLOW_POLL and (self.place.node == 0 or now - began > HEAD_START):
                tried = now
                if self._patiently(lambda: self.roll.stop_asked):
                    return "preempted"
                refused = self._patiently(self._try_to_lead)
                if refused is None:
                    if outcome := self._lead():
                        return outcome
                elif self._patiently(self._is_led_by_others):
                    foreign = foreign or now
                    if now - foreign > self.lease.patience:
                        raise refused
                else:
                    foreign = 0.0
            self._stop.wait(FOLLOW_POLL)
        return "preempted"

    def _try_to_lead(self) -> LeaseHeldError | None:
        try:
            self.lease.acquire()
        except LeaseHeldError as error:
            return error
        return None

    def _is_led_by_others(self) -> bool:
        """Whether somebody has the lease who is no machine of this launch."""
        holder = self.lease.holder()
        if holder is None or self.lease.is_free():
            return False
        return holder[0] not in {member.owner for member in self.roll.look().values()}

    def _news(self) -> Announcement | None:
        return read_announcement(self.quick, self.config.run, self.place.launch)

    def _patiently(self, ask: Callable[[], T]) -> T:
        """`ask` of the store that answers at once or not at all, until it does; not for long, nor after a stop."""
        deadline = time.monotonic() + STORE_AWAY
        while True:
            try:
                return ask()
            except UnavailableError:
                if time.monotonic() > deadline or self._stop.wait(FOLLOW_POLL):
                    raise

    def _lead(self) -> Outcome | None:
        """With the lease ours. None when another machine of this launch took it over, as after a cut-off."""
        self._lost, renewing = None, threading.Event()
        renewer = threading.Thread(target=self._renew, args=(renewing,), daemon=True)
        renewer.start()
        try:
            adopt(self.store, self.config)  # another start may have replaced it before the lease was ours
            self.events = Events(self.store, self.config.run)
            outcome = self._supervise()
            if self._lost and self.place.nodes > 1:
                return None
            if outcome != "preempted":  # a machine that leaves says nothing of the others
                self._announce(Announcement(launch=self.place.launch, attempt=self.events.attempts, outcome=outcome))
            return outcome
        except LeaseHeldError:
            if self.place.nodes > 1:
                return None
            raise
        finally:
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
            self._patiently(self.lease.settle)  # its uploader may have been killed in the middle of a commit
            advanced, committed = committed, self._committed()
            stopping = self._stop.is_set()
            if end.outcome == "completed" or (end.outcome == "preempted" and stopping):
                self._tell(end.outcome, end.message + self._notice, committed)
                return end.outcome
            if end.outcome == "preempted":
                failures = 0
                self._tell("regroup", "saved; going on with the machines that are there now", committed)
                continue
            failures = 0 if committed != advanced else failures + 1
            self._tell("died", end.message, committed)
            if stopping:
                kept = "nothing" if committed is None else f"step {committed}"
                self._tell("preempted", f"stopped before it could save; {kept} is committed", committed)
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

    def _attempt(self, committed: int | None) -> End:
        """One attempt with the machines that are there: from their gathering until this machine's ranks are gone."""
        team = self._gather() if self.place.nodes > 1 else self._alone()
        if isinstance(team, End):
            return team
        number, ranks = self.events.attempts + 1, len(team) * self.ranks_per_node
        where = "" if committed is None else f", resuming from step {committed}"
        machines = f" on {len(team)} of {self.place.nodes} machines" if self.place.nodes > 1 else ""
        many = "rank" if ranks == 1 else "ranks"
        message = f"attempt {number}: {ranks} {many}{machines}, ZeRO-{self.config.zero_stage}{where}"
        self.events.add("resumed" if committed is not None else "started", message, number, committed)
        master = f"{self.place.address}:{free_port()}"
        news = Announcement(launch=self.place.launch, attempt=number, members=tuple(team), ranks=ranks, master=master)
        self._announce(news)
        self._regroup.clear()
        end = self._launch(news, lambda: self._lead_on(news))
        return self._heard(number, end) if end.outcome == "failed" and len(team) > 1 else end

    def _alone(self) -> list[str] | End:
        me = self.roll.me
        return End("failed", f"{me.name} {me.problem}", retry=False) if me.problem else [self.owner]

    def _gather(self) -> list[str] | End:
        """Owners of the machines that begin, this one first: all, or after `patience` as many as the batch allows."""
        began, told = time.monotonic(), False
        while not self._stop.is_set():
            here = self._patiently(self.roll.look)
            fit = {number: member for number, member in here.items() if not self._problem(member)}
            waited = time.monotonic() - began
            size = self._team_size(len(fit)) if self.place.node in fit else 0
            if size == self.place.nodes or (size and waited > self.place.patience):
                others = [fit[number].owner for number in sorted(fit) if number != self.place.node]
                return [self.owner, *others[: size - 1]]
            absent = self._describe_absent(here)
            if waited > max(self.config.hang_timeout, self.place.patience) or (
                len(here) == self.place.nodes and not size
            ):
                return End("failed", f"not enough machines to go on: {absent}", retry=False)
            if not told and waited > 5:
                told = True
                self._tell("waiting", f"waiting for all {self.place.nodes} machines: {absent}", self._committed())
            self._stop.wait(POLL)
        return End("failed", "stopped while waiting for the other machines")

    def _team_size(self, present: int) -> int:
        """The most machines, of those present, over which the global batch divides; 0 if too few."""
        for size in range(present, self.place.min_nodes - 1, -1):
            if size and with_ranks(self.config, size * self.ranks_per_node):
                return size
        return 0

    def _problem(self, member: Member) -> str:
        mine = self.roll.me.versions
        different = f"has {member.versions}, machine {self.place.node} has {mine}; install the same on both"
        return member.problem or (different if member.versions != mine else "")

    def _describe_absent(self, here: Mapping[int, Member]) -> str:
        missing = [str(number) for number in range(self.place.nodes) if number not in here]
        said = [f"{member.name} {problem}" for member in here.values() if (problem := self._problem(member))]
        if missing:
            said.append(f"machine {', '.join(missing)} has not reached the store {self.store.url}")
        return "; ".join(said) or f"the global batch does not divide over {len(here)} machines"

    def _lead_on(self, news: Announcement) -> End | None:
        """The leader's look at the others during an attempt."""
        if self._lost:
            return End("failed", self._lost, retry=False)
        if self.place.nodes == 1:
            return None
        here = self.roll.look()
        owners = {member.owner for member in here.values()}
        gone = [owner for owner in news.members if owner not in owners and owner != self.owner]
        if gone:
            return End("failed", f"lost {len(gone)} of {len(news.members)} machines: {', '.join(gone)}")
        fit = sum(not self._problem(member) for member in here.values())
        if self._team_size(fit) > len(news.members):
            self._regroup.set()
        return None

    def _heard(self, number: int, end: End) -> End:
        """With what the other machines say of the same attempt: the cause may lie there."""
        here = self._patiently(self.roll.look).values()
        said = [member for member in here if member.ended and member.ended.attempt == number]
        words = [f"{member.name}: {member.ended.message}" for member in said if member.ended]
        final = any(member.ended and not member.ended.retry for member in said)
        return End(end.outcome, "; ".join([end.message, *words]), end.retry and not final)

    def _follow(self, news: Announcement) -> None:
        """This machine's part of the leader's attempt."""
        end = self._launch(news, lambda: self._follow_on(news))
        console.print(f"machine {self.place.node}, attempt {news.attempt}: {end.message}", markup=False)
        if end.outcome == "failed":
            self.roll.say(Ended(attempt=news.attempt, message=end.message, retry=end.retry))

    def _follow_on(self, news: Announcement) -> End | None:
        """A follower's look at the leader during an attempt."""
        newest = self._news()
        if newest and (newest.attempt > news.attempt or newest.outcome == "failed"):
            return End("failed", "the other machines have gone on without this one")
        if self.lease.is_free():
            return End("failed", "the machine that led is gone")
        return None

    def _launch(self, news: Announcement, look: Callable[[], End | None]) -> End:
        """Runs this machine's ranks of an announced attempt until they are gone."""
        config = with_ranks(self.config, news.ranks)
        assert config is not None  # the leader has seen to it
        machine = "" if self.place.nodes == 1 else f"-{self.place.node}"
        folder = self.config.folder / "attempts" / f"{news.attempt:04d}{machine}"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            path = write_attempt(Attempt(config=config, owner=news.members[0], folder=folder))
        except StarflowError as error:
            return End("failed", str(error), retry=False)
        crew = Crew(
            ranks=self.ranks_per_node,
            folder=folder,
            arguments=news.torchrun(self.owner),
            loopback=news.on_one_machine,
            hang_timeout=self.config.hang_timeout,
            stop=lambda: self._stop.is_set() or self._regroup.is_set(),
            look=lambda: self._unless_away(look),
            look_every=self.config.lease_seconds / 6,
        )
        return crew.run(path)

    def _unless_away(self, look: Callable[[], End | None]) -> End | None:
        """A store that is away for a while says nothing of the other machines."""
        try:
            return look()
        except StoreError:
            return None

    def _announce(self, news: Announcement) -> None:
        if self.place.nodes > 1:
            self._patiently(self.lease.check)  # a machine that was cut off must not speak for the others
            announce(self.store, self.config.run, news)

    def _renew(self, done: threading.Event) -> None:
        away = False
        while not done.wait(self.config.lease_seconds / 4):
            try:
                self.lease.renew()
            except LeaseHeldError as error:
                self._lost = str(error)
                return
            except StarflowError as error:  # whoever commits asks for the lease again anyway
                if not away:
                    self._say(f"the store does not answer; training goes on, saves wait for it: {error}")
                away = True
            else:
                if away:
                    self._say("the store answers again")
                away = False

    def _committed(self) -> int | None:
        steps = self._patiently(lambda: list_steps(self.quick, self.config.run))
        return steps[-1] if steps else None

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT mean: save and leave."""
        previous = {number: signal.signal(number, self._request_stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _request_stop(self, number: int, frame: object) -> None:
        if self._stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait for the save
        self._stop.set()

    def _notified(self, notice: str) -> None:
        """The cloud takes this machine: the same as SIGTERM."""
        self._say(f"{notice}: saving and leaving")
        self._notice = f" ({notice})"
        self._stop.set()

    def _tell(self, kind: str, message: str, committed: int | None = None) -> None:
        if self._lost:  # the events are the new writer's
            self._say(message)
            return
        self.events.add(kind, message, max(1, self.events.attempts), committed)

    def _say(self, message: str) -> None:
        console.print(f"run {self.config.run}: {message}", highlight=False, soft_wrap=True, markup=False)
