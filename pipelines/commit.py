"""The end of a refresh: the snapshot is published, then the ledger records what was learned of each URL.

A kill between the two is harmless: the next refresh finds a snapshot with the name of the one that the ledger does not
know yet, commits the ledger for it, and goes on from there.
"""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import batches
from pipelines.filters import FILTERS_VERSION
from pipelines.ledger import KEPT, MOMENT, SCHEMA, Spill, get_table, newest
from pipelines.plan import Batch
from pipelines.revalidation import LEFT, with_history, without_left
from pipelines.state import RefreshState
from starflow import snapshots
from starflow.errors import AlreadyExistsError, StarflowError
from starflow.manifest import ObjectRef
from starflow.snapshots import Part, Snapshot
from starflow.urls import host_of

#: Reasons that speak of our network or crawler, not of the URL.
_OURS = frozenset(("dns", "connection", "timeout", "crawl_lost", "batch_time_limit"))
#: When so many hosts that were never asked before all fail so, it is our network, and not a dead host or two.
_HOSTS = 3
_KEPT_ROWS = 2**20
_MAX_BACKOFF_SECONDS = 30 * 86400


def publish_snapshot(state: RefreshState) -> dict[str, Any]:
    """Publishes and commits; sets `state.published` and `state.dropped`.

    Raises StarflowError when nothing can be published: then the refresh is forgotten, and asked anew next time.
    """
    if not state.plans:
        if state.parent is None:
            raise StarflowError(
                f"nothing in {state.config.urls} is new or due, and {state.store.url} holds no snapshot; "
                "use another list or another store"
            )
        state.published = state.parent
        return {"added": 0}
    left = state.left()
    ledger_files, kept, dropped = _write_ledger(state, left)
    state.dropped = dict(sorted(dropped.items()))
    parts = list(state.encoded.parts) if state.encoded is not None else []
    added = sum(part.count for part in parts)
    try:
        if not added and not len(left):
            _check_worth_keeping(state)
            state.published = state.parent
        else:
            state.published = _publish(state, parts, left)
    except NothingLeftError:
        state.ledger.discard(ledger_files, kept)
        state.workspace.delete()
        raise
    if state.published is not None and state.published != state.parent:
        _announce(state, state.published)
    snapshot = state.published.id if state.published else None
    state.ledger.commit(snapshot, ledger_files, kept)
    return {"added": added, "snapshot": snapshot, "dropped": state.dropped, "removed": _removed(state)}


class NothingLeftError(StarflowError):
    """A refresh that would publish no sample at all; it is forgotten, and its URLs are asked anew next time."""


def _removed(state: RefreshState) -> dict[str, int]:
    new = state.published is not None and state.published != state.parent
    return state.published.removed if new and state.published else {}


def _check_worth_keeping(state: RefreshState) -> None:
    """Without a new sample, what was learned is worth keeping only beside a snapshot, and if it is about the URLs."""
    if state.parent is not None and not _is_network_down(state):
        return
    reasons = set(state.dropped)
    counted = ", ".join(f"{reason} {count}" for reason, count in state.dropped.items())
    asked = sum(batch.count for plan in state.plans if not plan.round for batch in plan.batches)
    remedy = "check the network, and allow_host for hosts of your own" if reasons <= _OURS else "check the list"
    if "private_address" in reasons:
        remedy = "a host with a private address is asked only if it is yours: name it with --allow-host (allow_host)"
    raise NothingLeftError(
        f"none of {asked} URLs of {state.config.urls} gave a usable picture ({counted}); {remedy}, "
        "then run the same command again"
    )


def _is_network_down(state: RefreshState) -> bool:
    """Whether several hosts were asked for the first time, and not one of all that were asked has answered.

    A retry that fails again, as a dead host does, is about the URL.
    """
    if not set(state.dropped) <= _OURS | {"duplicate_url"}:
        return False
    hosts: set[str] = set()
    for batch in state.batches:
        if batches.load_record(state.store, batch, batches.CrawlRecord).statuses.get("unchanged"):
            return False
        rows = get_table(state.store, batch.rows)
        hosts.update(map(host_of, rows.filter(pc.equal(rows["attempts"], 0))["url"].to_pylist()))
    return len(hosts) >= _HOSTS


def finish_published(state: RefreshState) -> None:
    """Commits the ledger of a refresh that was killed after it had published, and opens the next one."""
    snapshot = state.find_published() if state.plans else None
    if snapshot is None:
        return
    # What another process has planned since is not in this snapshot; it is asked for anew.
    state.plans = state.plans[: int(snapshot.versions["plans"])]
    files, kept, dropped = _write_ledger(state, state.left())
    state.recovered, state.dropped = state.name, dict(sorted(dropped.items()))
    # Others may have published since, and taken samples down.
    _announce(state, snapshots.newest_snapshot(state.store) or snapshot)
    state.ledger.commit(snapshot.id, files, kept)
    state.open()


def _announce(state: RefreshState, snapshot: Snapshot) -> None:
    """Before the ledger's commit: who is killed in between says it once more, rather than never."""
    state.on_event({"event": "published", "stage": "publish", "snapshot": snapshot})


def _publish(state: RefreshState, parts: list[Part], left: pa.Table) -> Snapshot:
    try:
        return _publish_on(state, state.parent, parts, left)
    except AlreadyExistsError:
        newest_one = snapshots.newest_snapshot(state.store)
        ours = state.find_published()
        if newest_one is None or ours is not None or newest_one.takedowns != state.takedowns_ref:
            # Another process ends this very refresh, or what was filtered does not know the newest takedown.
            raise
        return _publish_on(state, newest_one, parts, left)


def _publish_on(state: RefreshState, parent: Snapshot | None, parts: list[Part], left: pa.Table) -> Snapshot:
    config = state.config
    staying, removed = without_left(state.store, parent, left) if parent else ([], {})
    if not sum(part.count for part in (*staying, *parts)):
        counted = ", ".join(f"{reason} {count}" for reason, count in removed.items())
        raise NothingLeftError(
            f"every sample of {parent.id if parent else 'the store'} would leave ({counted}), and no new one came; "
            "check the network and the list, then run the same command again"
        )
    captioner = batches.load_record(state.store, state.batches[-1], batches.CaptionRecord).captioner
    sources: Counter[str] = Counter()
    for plan in state.plans:
        sources.update(plan.sources)
    return snapshots.publish(
        state.store,
        parent=parent,
        parts=[*staying, *parts],
        image_size=config.image_size,
        dropped=state.dropped,
        added=sum(part.count for part in parts),
        removed=removed,
        sources=sources,
        versions={
            "captioner": captioner,
            "filters": FILTERS_VERSION,
            "refresh": state.name,
            "plans": str(len(state.plans)),
        },
        attribution=config.attribution or (parent.attribution if parent else None),
    )


def _write_ledger(
    state: RefreshState, left: pa.Table
) -> tuple[dict[int, tuple[ObjectRef, ...]], tuple[ObjectRef, ...], Counter[str]]:
    """(new files of each touched partition, files of kept pictures, URLs that gave no sample by reason)."""
    spill = Spill(state.work / f"learned-{state.name}", state.ledger.partitions)
    for batch in state.batches:
        spill.add(_learned(state, batch))
    files: dict[int, tuple[ObjectRef, ...]] = {}
    dropped: Counter[str] = Counter({"duplicate_url": sum(plan.duplicates for plan in state.plans)})
    if state.encoded is not None:
        dropped.update(state.encoded.dropped)
    kept = list(state.ledger.kept_without(left["id"].combine_chunks()))
    fresh = KEPT.empty_table()
    for partition, rows in spill.read():
        rows = newest(rows)
        lost = pc.if_else(pc.equal(rows["reason"], ""), rows["dropped"], rows["reason"])
        dropped.update(reason for reason in lost.to_pylist() if reason and reason != "unchanged")
        is_new = pc.and_(pc.equal(rows["status"], "ok"), pc.equal(rows["dropped"], ""))
        fresh = pa.concat_tables([fresh, rows.filter(is_new).select(KEPT.names)])
        if len(fresh) >= _KEPT_ROWS:
            kept += state.ledger.write_kept(fresh)
            fresh = KEPT.empty_table()
        files[partition] = state.ledger.write(partition, with_history(state.ledger, partition, rows))
    return files, (*kept, *state.ledger.write_kept(fresh)), +dropped


def _learned(state: RefreshState, batch: Batch) -> pa.Table:
    """The batch's URLs as ledger rows, and which of them `stay` what they were: see `with_history`."""
    crawl = batches.load_record(state.store, batch, batches.CrawlRecord)
    filtered = batches.load_record(state.store, batch, batches.FilterRecord)
    table = batches.get_table(state.store, crawl.fetched)
    drops = batches.get_table(state.store, filtered.dropped)
    place = pc.index_in(table["key"], drops["key"].combine_chunks())
    asked = batches.was_asked(table)
    attempts = pc.add(table["attempts"], asked.cast(pa.int16()))
    exhausted = pc.and_(pc.equal(table["status"], "retry"), pc.greater_equal(attempts, state.config.max_attempts))
    status = pc.if_else(exhausted, "failed", table["status"])
    settled = pc.is_in(status, pa.array(["ok", "unchanged"]))
    left = get_table(state.store, crawl.left) if crawl.left is not None else LEFT.empty_table()
    columns = {
        **{name: table[name] for name in SCHEMA.names if name in table.column_names},
        "status": status,
        "reason": pc.fill_null(table["reason"], ""),
        "dropped": pc.fill_null(drops["dropped"].combine_chunks().take(place), ""),
        "attempts": pc.if_else(settled, pa.scalar(0, pa.int16()), attempts),
        "next_retry": _next_retry(state, status, pc.if_else(asked, attempts, 1), _until_retry(state, crawl, table)),
        "last_seen": pa.array([state.now] * len(table), MOMENT),
    }
    rows = pa.table({name: columns[name] for name in SCHEMA.names}, schema=SCHEMA)
    stays = pc.and_(pc.is_valid(table["known_id"]), pc.not_equal(status, "ok"))
    return rows.append_column(
        "stays", pc.and_(stays, pc.invert(pc.is_in(table["known_id"], left["id"].combine_chunks())))
    )


def _until_retry(state: RefreshState, crawl: batches.CrawlRecord, table: pa.Table) -> pa.ChunkedArray:
    """Seconds from the moment of the refresh to the end of each server's Retry-After, 0 without."""
    late = (crawl.fetched_at - state.now).total_seconds() if crawl.fetched_at else 0.0
    return pc.fill_null(pc.add(table["retry_after"], late), 0.0)


def _next_retry(state: RefreshState, status: pa.ChunkedArray, attempts: Any, until: pa.ChunkedArray) -> pa.Array:
    """When to try again: later each time, and not before the server's Retry-After."""
    doubled = state.config.retry_after * 2.0 ** (attempts.to_numpy() - 1)
    waits = np.maximum(np.minimum(doubled, _MAX_BACKOFF_SECONDS), until.to_numpy())
    return pa.array(
        [
            state.now + timedelta(seconds=float(wait)) if each == "retry" else None
            for each, wait in zip(status.to_pylist(), waits, strict=True)
        ],
        MOMENT,
    )
