"""What happened to a run: one printed line and one line of ``runs/<run>/events.jsonl`` an event."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from starflow.console import console
from starflow.errors import NotFoundError, StoreError
from starflow.objectstore import ObjectStore


def events_key(run: str) -> str:
    return f"runs/{run}/events.jsonl"


def read_events(store: ObjectStore, run: str) -> list[dict[str, Any]]:
    """The run's events, oldest first: each has kind, time (ISO 8601, UTC), attempt, step and message."""
    try:
        data = store.read(events_key(run))
    except NotFoundError:
        return []
    return [json.loads(line) for line in data.splitlines()]


class Events:
    """The supervisor's log. It goes on in memory while the store is away."""

    def __init__(self, store: ObjectStore, run: str) -> None:
        self._store, self._run = store, run
        self._events = read_events(store, run)

    @property
    def attempts(self) -> int:
        """Attempts so far, those of earlier supervisors included."""
        return max((int(event["attempt"]) for event in self._events), default=0)

    def add(self, kind: str, message: str, attempt: int, step: int | None) -> None:
        """Prints and records an event; `step` is the last committed one."""
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._events.append({"kind": kind, "time": time, "attempt": attempt, "step": step, "message": message})
        console.print(f"run {self._run}: {message}", highlight=False, soft_wrap=True, markup=False)
        lines = "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in self._events)
        try:
            self._store.write(events_key(self._run), lines.encode())
        except StoreError as error:
            console.print(f"this event could not be stored: {error}", highlight=False, soft_wrap=True, markup=False)
