"""What the stages of one refresh share; all of it can be rebuilt from the store."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines import batches
from pipelines.config import RefreshConfig
from pipelines.guard import FetchPolicy
from pipelines.ledger import Ledger, get_table
from pipelines.plan import Batch, Plan, Workspace
from pipelines.revalidation import LEFT
from starflow.errors import NotFoundError
from starflow.objectstore import open_store
from starflow.snapshots import Snapshot, load_snapshot, newest_snapshot, snapshot_numbers
from starflow.takedowns import Takedowns
from starflow.urls import host_of, is_below

#: A small dictionary with at least `event` and `stage`; what progress bars and run pages show.
Event = dict[str, Any]
OnEvent = Callable[[Event], None]
#: Does a named piece of work and returns its record: at once, or as a task that a page shows.
DoWork = Callable[[str, Callable[[], Any]], Any]


def at_once(name: str, work: Callable[[], Any]) -> Any:
    """Just does it."""
    return work()


class RefreshState:
    """The store, the ledger before this refresh, its workspace and plans, and the snapshot it starts from."""

    def __init__(self, config: RefreshConfig, work: Path, on_event: OnEvent, do_work: DoWork = at_once) -> None:
        self.config, self.work, self.on_event, self.do_work = config, work, on_event, do_work
        self.store = open_store(config.store)
        self.encoded: Any = None
        self.published: Snapshot | None = None
        self.dropped: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.recovered = ""  # name of the refresh that a killed run had published, and this one has ended
        self.open()

    def open(self) -> None:
        """Reads where the store stands."""
        self.ledger = Ledger(self.store, self.config.ledger_partitions)
        self.workspace = Workspace(self.store, self.ledger.generation + 1)
        self.plans: list[Plan] = self.workspace.plans()
        newest = newest_snapshot(self.store)
        self.takedowns_ref = newest.takedowns if newest else None
        self.takedowns = Takedowns.load(self.store, self.takedowns_ref)
        self.parent = self._planned_on(newest) if self.plans else newest

    def _planned_on(self, newest: Snapshot | None) -> Snapshot | None:
        """The snapshot that the refresh was planned on, also when there are newer ones by now; or, when garbage
        collection has deleted it meanwhile, the newest."""
        name = self.plans[0].parent
        try:
            return load_snapshot(self.store, name) if name else None
        except NotFoundError:
            return newest

    @property
    def name(self) -> str:
        """Names the refresh in the snapshot that it publishes."""
        return str(self.ledger.generation + 1)

    def find_published(self) -> Snapshot | None:
        """The snapshot that this refresh has published already, when it was killed right after."""
        planned_on = self.plans[0].parent if self.plans else None
        after = int(planned_on.partition("-")[0]) if planned_on else 0
        for number in snapshot_numbers(self.store):
            if number > after:
                snapshot = load_snapshot(self.store, str(number))
                if snapshot.versions.get("refresh") == self.name:
                    return snapshot
        return None

    @property
    def now(self) -> datetime:
        """The moment that counts as now: that of the first plan, also in a run that resumes it."""
        return self.plans[0].moment if self.plans else batches.utc_now()

    @property
    def batches(self) -> list[Batch]:
        """The batches of all plans, in order."""
        return [batch for plan in self.plans for batch in plan.batches]

    def left(self) -> pa.Table:
        """The samples of the parent (schema LEFT) that leave, once all batches have been fetched."""
        found = [LEFT.empty_table()]
        for batch in self.batches if any(plan.sampled for plan in self.plans) else ():
            record = batches.load_record(self.store, batch, batches.CrawlRecord)
            if record.left is not None:
                found.append(get_table(self.store, record.left))
        return pa.concat_tables(found)

    @property
    def policy(self) -> FetchPolicy:
        """What a fetch may do; redirects, too, lead to no host that was taken down."""
        return self.config.policy(value for kind, value in self.takedowns.entries if kind == "host")

    def blocked(self, url: str, known_id: str | None) -> str:
        """Why the URL, which gave the content `known_id` last time, is not asked for; "" when it is."""
        if is_below(host_of(url), self.config.block_hosts):
            return "blocked_host"
        return "takedown" if self.takedowns.blocks([known_id], [url])[0] else ""

    def progress(self, stage: str, done: int, total: int | None) -> None:
        """Reports how far a stage is."""
        self.on_event({"event": "progress", "stage": stage, "done": done, "total": total})
