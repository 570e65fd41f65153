"""A refresh: plan, crawl, caption, filter, encode, publish.

Each stage is a plain function on the shared state. It commits what it makes and skips what is committed, so that the
same command again, after any kill, goes on where it stopped and ends with the same snapshot. The command line and
the Prefect flow run the same list of stages.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import batches, gate
from pipelines.captioners import AltText
from pipelines.commit import finish_published, publish_snapshot
from pipelines.config import CAPTION_SETTINGS, FILTER_SETTINGS, RefreshConfig
from pipelines.crawl import FULL
from pipelines.duplicates import find_duplicates
from pipelines.filters import apply_filters, build_filters
from pipelines.ledger import KEPT
from pipelines.plan import Batch, Plan, plan_list
from pipelines.settings import check_settings
from pipelines.state import OnEvent, RefreshState
from pipelines.workfolder import work_folder
from starflow.config import Config
from starflow.errors import ConfigError, StarflowError

#: Answers with a longer Retry-After wait for the next refresh, in seconds.
PATIENCE_SECONDS = 30.0
#: Pictures whose duplicates are looked for in one pass over those kept before.
WINDOW_ROWS = 2**21

Counts = dict[str, Any]


class RefreshResult(Config):
    """What a refresh did; `added` is 0 and `snapshot` the parent when nothing was new.

    `added` and `kept` make `total`; `kept` and the sum of `removed` make the parent's total. `dropped` are URLs of the
    list that gave no sample now, `removed` samples of the parent that left, both by reason.
    """

    snapshot: str
    parent: str | None
    added: int
    kept: int
    total: int
    dropped: dict[str, int]
    removed: dict[str, int]
    seconds: dict[str, float]


def plan(state: RefreshState) -> Counts:
    """Finds the URLs of the list that are new or due, after ending a refresh that was killed at its very end."""
    finish_published(state)
    check_settings(state)
    if _is_decided(state):
        return _planned(state)
    plan = plan_list(
        state.config,
        state.ledger,
        state.workspace,
        state.plans,
        state.parent.id if state.parent else None,
        state.now,
        state.work,
        lambda done: state.progress("plan", done, None),
    )
    if plan is not None:
        state.plans.append(plan)
    return _planned(state)


def _planned(state: RefreshState) -> Counts:
    return {"urls": sum(batch.count for batch in state.batches), "batches": len(state.batches)}


def _is_decided(state: RefreshState) -> bool:
    """Forgets the candidate that the gate refused last if that was asked for; whether it is accepted as it is."""
    waiting = state.workspace.refused()
    # Without plans: left over by who was killed while forgetting it.
    if waiting and (not state.plans or state.config.gate_discard == waiting):
        state.workspace.delete()
        state.open()
    return waiting != "" and bool(state.plans) and state.config.gate_accept == waiting


def crawl(state: RefreshState) -> Counts:
    """Fetches every batch of every plan, then plans and fetches what is worth another try."""
    statuses: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    done = 0
    plans = list(state.plans)
    while plans:
        for batch in [batch for plan in plans for batch in plan.batches]:
            record = _crawl_one(state, batch, done)
            done += batch.count
            statuses.update(record.statuses)
            reasons.update(record.reasons)
            state.on_event(
                {"event": "batch", "stage": "crawl", "batch": batch.folder, **record.model_dump(mode="json")}
            )
        plans = _plan_retries(state)
    return {"statuses": dict(statuses), "reasons": dict(reasons)}


def _crawl_one(state: RefreshState, batch: Batch, before: int) -> batches.CrawlRecord:
    record = batches.load_record(state.store, batch, batches.CrawlRecord)
    if record is not None:
        return record  # type: ignore[no-any-return]

    def on_progress(done: int) -> None:
        state.progress("crawl", before + done, sum(batch.count for batch in state.batches))

    def work() -> batches.CrawlRecord:
        return batches.crawl_batch(
            state.store, batch, state.config, state.policy, state.blocked, state.work, on_progress
        )

    return state.do_work(f"batch {batch.folder.strip('/').rpartition('/')[2]} of {batch.count:,} URLs", work)


def _plan_retries(state: RefreshState) -> list[Plan]:
    """A plan with the failures of the plans that no retry plan covers yet, when there are any."""
    covered = {number for plan in state.plans for number in plan.covers}
    open_plans = [plan for plan in state.plans if plan.number not in covered and plan.round < state.config.retry_rounds]
    waits = [0.0]

    def rows() -> Iterator[pa.Table]:
        for batch in [batch for plan in open_plans for batch in plan.batches]:
            record = batches.load_record(state.store, batch, batches.CrawlRecord)
            again, wait = batches.retry_rows(state.store, record, state.config.max_attempts, PATIENCE_SECONDS)
            waits.append(wait)
            yield again

    found = state.workspace.write_batches(len(state.plans), rows(), state.config.batch_size)
    if not found:
        return []
    following = Plan(
        number=len(state.plans),
        round=max(plan.round for plan in open_plans) + 1,
        covers=tuple(plan.number for plan in open_plans),
        moment=state.now,
        parent=state.plans[0].parent,
        batches=found,
    )
    state.workspace.commit(following)
    state.plans.append(following)
    time.sleep(max(waits))  # what the servers asked for in Retry-After
    return [following]


def caption(state: RefreshState) -> Counts:
    """Captions the pictures of every batch."""
    quality: Counter[str] = Counter()
    captioner: Any = AltText() if state.config.captioner == "alt" else None
    with ExitStack() as stack:
        for number, batch in enumerate(state.batches):
            record = batches.load_record(state.store, batch, batches.CaptionRecord)
            if record is None or record.settings != state.config.digest(CAPTION_SETTINGS):
                captioner = captioner or stack.enter_context(_captioning(state))
                crawled = batches.load_record(state.store, batch, batches.CrawlRecord)
                record = batches.caption_batch(state.store, batch, crawled, captioner, state.config)
            quality.update(record.quality)
            state.progress("caption", number + 1, len(state.batches))
    return {"captioner": state.config.captioner, "quality": dict(quality)}


def _captioning(state: RefreshState) -> AbstractContextManager[Any]:
    """The configured captioner at work, on Ray if it is a model."""
    from pipelines.captioning import captioning

    return captioning(state.store, state.config)


def filter_(state: RefreshState) -> Counts:
    """Filters every batch: by each picture's own record, then duplicates, then the score."""
    reasons: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    done = 0
    decided = (state.takedowns_ref, _filter_settings(state))
    kept = _Kept(state)
    for window in _windows(state.batches):
        records = [batches.load_record(state.store, batch, batches.FilterRecord) for batch in window]
        if any(record is None or (record.takedowns, record.settings) != decided for record in records):
            records = _filter_window(state, window, kept.tables())
        kept.add(records)
        for record in records:
            reasons.update(record.reasons)
            for reason, urls in record.examples.items():
                examples.setdefault(reason, []).extend(urls)
        done += len(window)
        state.progress("filter", done, len(state.batches))
    return {
        "reasons": dict(reasons),
        "examples": {reason: urls[: batches.EXAMPLES] for reason, urls in examples.items()},
    }


def _filter_settings(state: RefreshState) -> str:
    return state.config.digest(FILTER_SETTINGS + CAPTION_SETTINGS)


def _windows(found: list[Batch]) -> Iterator[list[Batch]]:
    window: list[Batch] = []
    for batch in found:
        if window and sum(b.count for b in window) + batch.count > WINDOW_ROWS:
            yield window
            window = []
        window.append(batch)
    if window:
        yield window


class _Kept:
    """Ids and perceptual hashes of the pictures kept so far: by earlier refreshes, and in windows gone through."""

    def __init__(self, state: RefreshState) -> None:
        self.state = state
        self._records: list[batches.FilterRecord] = []
        self._files: list[Path] = []

    def add(self, records: list[batches.FilterRecord]) -> None:
        """Takes the records of a window."""
        self._records += records

    def tables(self) -> Iterator[pa.Table]:
        """Tables (id, phash), one after the other; those of windows come from the store once, then from local disk."""
        for table in self.state.ledger.kept():
            yield table.filter(pc.invert(pc.is_in(table["id"], self._left)))
        if self._records:
            self._files.append(self.state.work / f"kept-{len(self._files):06d}.parquet")
            with pq.ParquetWriter(self._files[-1], KEPT) as writer:
                for record in self._records:
                    writer.write_table(batches.get_table(self.state.store, record.samples).select(KEPT.names))
            self._records.clear()
        for file in self._files:
            yield from (pa.Table.from_batches([batch]) for batch in pq.ParquetFile(file).iter_batches())

    @cached_property
    def _left(self) -> pa.Array:
        return self.state.left()["id"].combine_chunks()


def _filter_window(state: RefreshState, window: list[Batch], kept: Iterator[pa.Table]) -> list[batches.FilterRecord]:
    filters = build_filters(state.config)
    crawls = [batches.load_record(state.store, batch, batches.CrawlRecord) for batch in window]
    tables, verdicts = [], []
    for batch, record in zip(window, crawls, strict=True):
        captions = batches.load_record(state.store, batch, batches.CaptionRecord)
        rows = batches.candidates(state.store, record, captions, state.config)
        reasons = apply_filters(rows, filters)
        reasons[state.takedowns.blocks(rows["id"].to_pylist(), rows["url"].to_pylist())] = "takedown"
        tables.append(rows)
        verdicts.append(reasons)
    _mark_duplicates(tables, verdicts, kept, state.config.near_duplicates)
    for record, rows, reasons in zip(crawls, tables, verdicts, strict=True):
        batches.apply_score(state.store, record, rows, reasons, state.config, state.work)
    return [
        batches.filter_batch(state.store, *parts, state.takedowns_ref, _filter_settings(state))
        for parts in zip(window, crawls, tables, verdicts, strict=True)
    ]


def _mark_duplicates(
    tables: list[pa.Table], verdicts: list[np.ndarray], kept: Iterator[pa.Table], near: int | None
) -> None:
    """Sets the reason of duplicates, in place: of pictures `kept` before, and within the window."""
    alive = [pa.array(reasons == "") for reasons in verdicts]
    new = pa.concat_tables(
        [table.select(["id", "phash"]).filter(mask) for table, mask in zip(tables, alive, strict=True)]
    )
    found = np.array(["", "duplicate", "near_duplicate"], dtype=object)[find_duplicates(new, kept, near)]
    position = 0
    for reasons in verdicts:
        places = np.flatnonzero(reasons == "")
        reasons[places] = found[position : position + len(places)]
        position += len(places)


def encode(state: RefreshState) -> Counts:
    """Encodes the kept samples into parts."""
    records = [batches.load_record(state.store, batch, batches.FilterRecord) for batch in state.batches]
    tables = [record.samples.key for record in records if record.count]
    if not tables:
        return {}
    from pipelines.encode import encode as encode_tables
    from pipelines.encode_plan import EncodeConfig, request_hash

    settings = state.config.model_dump(include=set(EncodeConfig.model_fields))
    config = EncodeConfig(**settings, address=state.config.ray_address)
    state.encoded = encode_tables(
        state.store,
        tables,
        config,
        # A list or settings that change meanwhile are other work; more actors go on with the same.
        f"{state.workspace.prefix}encode/{request_hash(tables, config)[:16]}",
        lambda done, total: state.progress("encode", done, total),
    )
    return {"parts": len(state.encoded.parts), "dropped": dict(state.encoded.dropped)}


def publish(state: RefreshState) -> Counts:
    """Commits the snapshot, then the ledger."""
    return publish_snapshot(state)


@dataclass(frozen=True)
class Stage:
    """One step of a refresh; `run` returns counts to show."""

    name: str
    run: Callable[[RefreshState], Counts]


STAGES = (
    Stage("plan", plan),
    Stage("crawl", crawl),
    Stage("caption", caption),
    Stage("filter", filter_),
    Stage("encode", encode),
    Stage("publish", publish),
)


def run_stage(state: RefreshState, stage: Stage) -> Counts:
    """Runs one stage between its two events. Raises StarflowError; disk space that ran out is one, too."""
    started = time.monotonic()
    state.on_event({"event": "stage", "stage": stage.name, "state": "started"})
    try:
        counts = stage.run(state)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise StarflowError(
            f"no room left for {error.filename or state.work} ({error.strerror}); free space there, or set TMPDIR to a "
            "folder with more, then run the same command again"
        ) from error
    seconds = round(time.monotonic() - started, 3)
    state.seconds[stage.name] = seconds
    state.on_event({"event": "stage", "stage": stage.name, "state": "done", "seconds": seconds, "counts": counts})
    return counts


def refresh(config: RefreshConfig, on_event: OnEvent = lambda event: None) -> RefreshResult:
    """Runs all stages, the gate before the last.

    Raises StarflowError when there is nothing to publish, the gate refuses, or the store or the list fails.
    """
    if config.gate == "person":
        raise ConfigError("gate=person pauses a run in the Prefect UI; on the command line write gate=automatic")
    counts: dict[str, Counts] = {}
    with work_folder() as work:
        state = RefreshState(config, work, on_event)
        for stage in STAGES:
            if stage.run is publish:
                gate.check(state, counts)
            counts[stage.name] = run_stage(state, stage)
        return result(state)


def result(state: RefreshState) -> RefreshResult:
    """What the finished refresh did."""
    snapshot = state.published
    if snapshot is None:
        raise StarflowError(f"the refresh of {state.store.url} has not been published; run its publish stage first")
    new = state.recovered != "" or snapshot.id != (state.parent.id if state.parent else None)
    counts = snapshot.counts
    return RefreshResult(
        snapshot=snapshot.id,
        parent=snapshot.parent,
        added=counts.added if new else 0,
        kept=counts.kept if new else counts.total,
        total=counts.total,
        dropped=state.dropped,
        removed=snapshot.removed if new else {},
        seconds=state.seconds,
    )
