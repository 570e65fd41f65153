"""Garbage collection of a whole store: snapshots and parts, and the downloads that refreshes have left behind."""

from __future__ import annotations

import io
import re
from collections.abc import Collection

import pyarrow.parquet as pq

from pipelines.ledger import Ledger
from pipelines.scrub import PREFIX, scrub_sources
from starflow.objectstore import ObjectStore
from starflow.takedowns import Takedowns
from starflow.upkeep import Garbage, collect_garbage

#: Where an encode plan lists the members of a part: (number of the refresh, id of the part).
_MEMBERS = re.compile(rf"{PREFIX}(\d+)/encode/.+/members/(\w+)\.parquet")


def collect(
    store: ObjectStore, keep: int | None = None, grace_hours: float = 168.0, dry_run: bool = False
) -> tuple[Garbage, int]:
    """Deletes what may go (see `starflow.upkeep.collect_garbage`), then erases the originals of what was taken down.

    Returns what went, and how many pictures were erased.
    """

    def hopeless(parts: Collection[str], takedowns: Takedowns) -> set[str]:
        return _hopeless(store, parts, takedowns)

    garbage = collect_garbage(store, keep, grace_hours, dry_run, hopeless)
    return garbage, 0 if dry_run else scrub_sources(store)


def _hopeless(store: ObjectStore, parts: Collection[str], takedowns: Takedowns) -> set[str]:
    """Which of the half-encoded `parts` no refresh will publish.

    Its refresh has ended without it; or it has a member that was taken down since, and then whoever still works on it
    is refused, and plans anew.
    """
    finished, found = Ledger(store, 1).generation, set()
    for info in store.list(PREFIX) if parts else ():
        match = _MEMBERS.fullmatch(info.key)
        if match is None or match[2] not in parts:
            continue
        table = pq.read_table(io.BytesIO(store.read(info.key)), columns=["id", "url"])
        blocked = takedowns.blocks(table["id"].to_pylist(), table["url"].to_pylist())
        if int(match[1]) <= finished or blocked.any():
            found.add(match[2])
    return found
