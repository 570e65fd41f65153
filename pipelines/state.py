"""What the stages of one refresh share; all of it can be rebuilt from the store."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from pipelines.config import RefreshConfig
from pipelines.ledger import Ledger
from pipelines.plan import Batch, Plan, Workspace, is_blocked
from starflow.objectstore import open_store
from starflow.snapshots import Snapshot, load_snapshot, newest_snapshot
from starflow.takedowns import Takedowns

#: A small dictionary with at least `event`; what progress bars and run pages show.
Event = dict[str, Any]
OnEvent = Callable[[Event], None]


class RefreshState:
    """The store, the ledger before this refresh, its workspace and plans, and the snapshot it starts from."""

    def __init__(self, config: RefreshConfig, work: Path, on_event: OnEvent) -> None:
        self.config, self.work, self.on_event = config, work, on_event
        self.store = open_store(config.store)
        self.ledger = Ledger(self.store, config.ledger_partitions)
        self.workspace = Workspace(self.store, self.ledger.generation + 1)
        self.plans: list[Plan] = self.workspace.plans()
        self.parent = self._parent()
        self.encoded: Any = None
        self.published: Snapshot | None = None
        self.dropped: dict[str, int] = {}
        self.seconds: dict[str, float] = {}

    def _parent(self) -> Snapshot | None:
        """The snapshot this refresh was planned on, although a killed run may have published its own already."""
        if not self.plans:
            return newest_snapshot(self.store)
        parent = self.plans[0].parent
        return load_snapshot(self.store, parent) if parent is not None else None

    @property
    def now(self) -> datetime:
        """The moment that counts as now: that of the first plan, also in a run that resumes it."""
        return self.plans[0].moment if self.plans else datetime.now(UTC).replace(microsecond=0)

    @property
    def batches(self) -> list[Batch]:
        """The batches of all plans, in order."""
        return [batch for plan in self.plans for batch in plan.batches]

    @cached_property
    def takedowns(self) -> Takedowns:
        """What must never come back."""
        return Takedowns.load(self.store, self.parent.takedowns if self.parent else None)

    def blocked(self, url: str) -> str:
        """Why the URL is not asked for; "" when it is."""
        if is_blocked(url, self.config.block_hosts):
            return "blocked_host"
        return "takedown" if self.takedowns.blocks([None], [url])[0] else ""

    def progress(self, stage: str, done: int, total: int | None) -> None:
        """Reports how far a stage is."""
        self.on_event({"event": "progress", "stage": stage, "done": done, "total": total})
