"""One writer per run: a lease object in the store that is free again when its owner falls silent.

Asking for the lease and creating a manifest are two requests. A writer that pauses between them may be superseded by
one that goes on from an older checkpoint, and commit after it. So a manifest is first stored as a draft and announced
in the lease, by a put that fails unless the lease is still ours; and whoever takes the lease creates what it
announces, before looking where to go on. The writer that lost the lease either cannot announce any more, or finds
that its checkpoint has been committed and is what its successor goes on from.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

from starflow.config import Config
from starflow.errors import AlreadyExistsError, ChangedError, NotFoundError, StoreError
from starflow.objectstore import ObjectInfo, ObjectStore
from training.processes import describe, is_gone
from training.silence import Silence

#: S3 refuses requests whose clock is off by more than 15 minutes, so no two writers' clocks differ by more, in seconds.
CLOCK_DIFFERENCE = 1800.0


class LeaseHeldError(StoreError):
    """Another process is writing this run."""


class Announced(Config):
    """A manifest that is about to be created under `key`; the object `draft` has its bytes until it has been."""

    key: str
    draft: str


class Record(Config):
    """What the lease says. owner: none when it was given back. seconds: of silence, after which it is free.

    expires: when that is, by the owner's clock (seconds since the epoch).
    """

    owner: str
    expires: float
    seconds: float = 30.0
    announced: Announced | None = None


class Lease:
    """``runs/<run>/lease.json``, a `Record`; under another name another lease. Safe to use from several threads."""

    def __init__(self, store: ObjectStore, run: str, owner: str, seconds: float = 30.0, name: str = "lease") -> None:
        self.store, self.run, self.owner, self.seconds = store, run, owner, seconds
        self.key = f"runs/{run}/{name}.json"
        self._silence, self._lock = Silence(seconds), threading.Lock()

    @property
    def patience(self) -> float:
        """Seconds for which to wait for the lease: twice the silence that frees it, as it was last seen."""
        return 2 * self._silence.seconds

    def acquire(
        self,
        wait: bool = False,
        on_wait: Callable[[str], None] = lambda message: None,
        give_up: Callable[[], bool] = lambda: False,
    ) -> None:
        """Takes the lease if it is free, and commits what it announces.

        It is free when it was given back, when its owner is known to have ended, when it has been silent for as long
        as it says while this object looked, or when it expired so long ago that clocks do not matter. With `wait`
        it waits for its `patience`; then, or as soon as `give_up`, raises LeaseHeldError naming the owner. Of a stall
        of this machine or of the store counts only as much as leaves the silence standing.
        """
        waited, looked, told = 0.0, time.monotonic(), False
        while owner := self._try():
            message = f"run {self.run!r} is being written by {describe(owner)}"
            now = time.monotonic()
            waited, looked = waited + min(now - looked, self._silence.seconds / 3), now
            if not wait or waited >= self.patience or give_up():
                raise LeaseHeldError(f"{message}; stop it there, or use another run name")
            if not told:
                on_wait(f"{message}; waiting for it to end or fall silent")
                told = True
            time.sleep(min(0.5, max(0.05, self.seconds / 20)))
        self.settle()

    def renew(self) -> None:
        """A sign of life. Raises LeaseHeldError when somebody else has taken it meanwhile."""
        info, record = self._ours()
        with contextlib.suppress(ChangedError):  # by a commit of ours; or the next call finds by whom
            self.store.replace(self.key, self._signed(record), info.etag)

    def check(self) -> None:
        """Raises LeaseHeldError unless the lease is ours."""
        self._ours()

    def release(self) -> None:
        """Gives the lease back if it is ours."""
        with contextlib.suppress(LeaseHeldError, ChangedError):
            info, record = self._ours()
            free = record.model_copy(update={"owner": "", "expires": time.time()})
            self.store.replace(self.key, _bytes(free), info.etag)

    def commit(self, key: str, draft: str, manifest: bytes) -> None:
        """Creates `key`, whose parts are all stored, as long as the lease is ours; see above. `draft`: a free key.

        Raises LeaseHeldError otherwise, AlreadyExistsError when another manifest is there.
        """
        self.check()
        if self.settle() == key:
            return  # an earlier try whose answer was lost
        self.store.write(draft, manifest)
        self._announce(Announced(key=key, draft=draft))
        self.store.create(key, manifest)
        self.store.delete([draft])

    def settle(self) -> str | None:
        """Creates the announced manifest if it may be missing; its key, or None if there was nothing to do."""
        _, record = self._read()
        if record is None or record.announced is None:
            return None
        try:
            manifest = self.store.read(record.announced.draft)
        except NotFoundError:  # it goes once the manifest is there
            return None
        with contextlib.suppress(AlreadyExistsError):
            self.store.create(record.announced.key, manifest)
        self.store.delete([record.announced.draft])
        return record.announced.key

    def holder(self) -> tuple[str, float] | None:
        """(owner, expiry by its clock) or None when nobody has it; a store that is away raises."""
        _, record = self._read()
        return (record.owner, record.expires) if record and record.owner else None

    def is_held(self) -> bool:
        """Whether somebody seems to hold it. One look has to believe the owner's clock: for people to read."""
        owner, expires = self.holder() or ("", 0.0)
        return expires > time.time() and not is_gone(owner)

    def is_free(self) -> bool:
        """Whether its owner has left, ended or been silent since this object's first look.

        That it expired long ago says nothing to who has seen it since: the store may have been away for everybody.
        """
        return not self._user(*self._read())

    def _try(self) -> str:
        """Takes the lease; or the name of who has it."""
        info, record = self._read()
        user = self._user(info, record)
        if record and user not in ("", self.owner) and time.time() <= record.expires + CLOCK_DIFFERENCE:
            return user
        try:
            if info is None:
                self.store.create(self.key, self._signed(None))
            else:
                self.store.replace(self.key, self._signed(record), info.etag)
        except (AlreadyExistsError, ChangedError):
            return "another one that was quicker"
        return ""

    def _user(self, info: ObjectInfo | None, record: Record | None) -> str:
        """Who may still be writing, as the object was just found; or nobody."""
        with self._lock:
            silent = self._silence.look({self.key: info.etag} if info else {}).get(self.key, 0.0)
        if record is None or not record.owner or is_gone(record.owner):
            return ""
        return "" if silent >= record.seconds else record.owner

    def _announce(self, announced: Announced) -> None:
        while True:
            info, record = self._ours()
            try:
                self.store.replace(self.key, _bytes(record.model_copy(update={"announced": announced})), info.etag)
            except ChangedError:
                continue  # renewed by our supervisor meanwhile, or no longer ours
            return

    def _ours(self) -> tuple[ObjectInfo, Record]:
        """The lease as it is in the store. Raises LeaseHeldError unless it is ours."""
        info, record = self._read()
        if info is None or record is None or record.owner != self.owner:
            owner = record.owner if record and record.owner else "nobody"
            raise LeaseHeldError(f"run {self.run!r} was taken over by {describe(owner)}; this writer stops")
        return info, record

    def _read(self) -> tuple[ObjectInfo | None, Record | None]:
        """The lease object and what it says; None when there is none that can be read as one."""
        info = self.store.head(self.key)
        if info is None:
            return None, None
        try:
            record = Record.model_validate_json(self.store.read(self.key))
        except (NotFoundError, ValueError):
            return info, None
        self._silence.seconds = max(self.seconds, record.seconds)
        return info, record

    def _signed(self, record: Record | None) -> bytes:
        announced = record.announced if record else None
        expires = time.time() + self.seconds
        return _bytes(Record(owner=self.owner, expires=expires, seconds=self.seconds, announced=announced))


def _bytes(record: Record) -> bytes:
    return record.model_dump_json().encode()
