"""One writer per run: a lease object in the store that expires when its owner falls silent."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

from starflow.errors import AlreadyExistsError, ChangedError, NotFoundError, StoreError
from starflow.objectstore import ObjectStore
from training.processes import is_gone


class LeaseHeldError(StoreError):
    """Another process is writing this run."""


class Lease:
    """``runs/<run>/lease.json``: {"owner", "expires"} (seconds since the epoch); other names are other leases."""

    def __init__(self, store: ObjectStore, run: str, owner: str, seconds: float = 30.0, name: str = "lease") -> None:
        self.store, self.run, self.owner, self.seconds = store, run, owner, seconds
        self.key = f"runs/{run}/{name}.json"

    def acquire(
        self,
        wait: float = 0.0,
        on_wait: Callable[[str], None] = lambda message: None,
        give_up: Callable[[], bool] = lambda: False,
    ) -> None:
        """Takes the lease if it is free, expired, or its owner is known to have ended; waits up to `wait` seconds.

        Raises LeaseHeldError naming the owner after that time, or as soon as `give_up`.
        """
        deadline, told = time.monotonic() + wait, False
        while not self._try():
            owner, expires = self.holder() or ("nobody", 0.0)
            message = f"run {self.run!r} is being written by {owner} for another {expires - time.time():.0f} s"
            if time.monotonic() >= deadline or give_up():
                raise LeaseHeldError(f"{message}; stop it there, or use another run name")
            if not told:
                on_wait(f"{message}; waiting")
                told = True
            time.sleep(min(0.5, max(0.05, self.seconds / 20)))

    def renew(self) -> None:
        """Extends the lease. Raises LeaseHeldError when somebody else has taken it meanwhile."""
        if not self._try():
            self.check()

    def check(self) -> None:
        """Raises LeaseHeldError unless the lease is ours: what a commit asks first."""
        owner, _ = self.holder() or ("nobody", 0.0)
        if owner != self.owner:
            raise LeaseHeldError(f"run {self.run!r} was taken over by {owner}; this writer ({self.owner}) stops")

    def release(self) -> None:
        """Gives the lease back if it is ours."""
        owner, _ = self.holder() or ("nobody", 0.0)
        if owner == self.owner:
            self.store.delete([self.key])

    def holder(self) -> tuple[str, float] | None:
        """(owner, expiry) or None when there is no lease that can be read as one; a store that is away raises."""
        if self.store.head(self.key) is None:
            return None
        try:
            lease = json.loads(self.store.read(self.key))
            return str(lease["owner"]), float(lease["expires"])
        except (NotFoundError, ValueError, KeyError, TypeError):
            return None

    def is_held(self) -> bool:
        """Whether anybody holds it and may still be writing."""
        owner, expires = self.holder() or ("", 0.0)
        return expires > time.time() and not is_gone(owner)

    def _try(self) -> bool:
        data = json.dumps({"owner": self.owner, "expires": time.time() + self.seconds}).encode()
        info = self.store.head(self.key)
        try:
            if info is None:
                self.store.create(self.key, data)
                return True
            owner, expires = self.holder() or ("nobody", 0.0)
            if owner != self.owner and expires > time.time() and not is_gone(owner):
                return False
            self.store.replace(self.key, data, info.etag)
        except (AlreadyExistsError, ChangedError):
            return False
        return True
