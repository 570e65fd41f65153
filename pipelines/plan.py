"""Which URLs a refresh asks for: those of the list that the ledger does not know, or that are due again.

A refresh works under ``crawl/refreshes/<generation>/`` and is resumed from there. A plan fixes its batches of URLs and
the moment that counts as now, so that a refresh that was killed goes on with the same URLs. A list that has changed
meanwhile adds another plan to the same refresh; what is to be retried makes another plan, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from pipelines.config import RefreshConfig
from pipelines.datasets import read_samples
from pipelines.duplicates import DUPLICATES
from pipelines.ledger import MOMENT, Ledger, Spill, get_table, put_table
from pipelines.sources import list_files, read_rows
from starflow import manifest
from starflow.config import Config
from starflow.errors import AlreadyExistsError, ConfigError, NotFoundError
from starflow.manifest import ObjectRef
from starflow.objectstore import ObjectStore
from starflow.urls import host_of, is_below, url_key

KIND, VERSION = "refresh-plan", 1
#: Under a refresh's folder: the name of the candidate that the gate refused.
REFUSED = "refused.txt"

#: A URL to ask for, and what the ledger knew of it: `known_id` is the content that it gave last time, `sampled` says
#: whether that became a sample of a snapshot, which leaves when the content is gone.
ROWS = pa.schema(
    [
        ("key", pa.string()),
        ("url", pa.string()),
        ("caption", pa.string()),
        ("licence", pa.string()),
        ("extra", pa.string()),
        ("attempts", pa.int16()),
        ("etag", pa.string()),
        ("last_modified", pa.string()),
        ("known_id", pa.string()),
        ("sampled", pa.bool_()),
        ("first_seen", MOMENT),
    ]
)


class Batch(Config):
    """URLs that are fetched together: the unit of work that is committed and resumed."""

    folder: str
    rows: ObjectRef
    count: int


class Plan(Config):
    """Batches to fetch, in order. `covers` are the plans whose failures a retry plan repeats; `sampled` counts the URLs
    that gave a sample before."""

    number: int
    round: int = 0
    covers: tuple[int, ...] = ()
    moment: datetime
    parent: str | None
    batches: tuple[Batch, ...]
    duplicates: int = 0
    sampled: int = 0
    sources: dict[str, int] = Field(default_factory=dict)


class Workspace:
    """Where one refresh keeps its plans and batches."""

    def __init__(self, store: ObjectStore, generation: int) -> None:
        self.store, self.prefix = store, f"crawl/refreshes/{generation:06d}/"

    def plans(self) -> list[Plan]:
        """The committed plans, in order."""
        keys = [info.key for info in self.store.list(f"{self.prefix}plans/") if info.key.endswith(".json")]
        return [Plan.model_validate(manifest.load(self.store, key, KIND, VERSION)) for key in keys]

    def write_batches(self, number: int, tables: Iterable[pa.Table], size: int) -> tuple[Batch, ...]:
        """Stores rows (schema ROWS) as batches of `size`."""
        batches = []
        for index, table in enumerate(_sized(tables, size)):
            name = f"{number:03d}-{index:06d}"
            ref = put_table(self.store, f"{self.prefix}plans/{name}", table)
            batches.append(Batch(folder=f"{self.prefix}batches/{name}/", rows=ref, count=len(table)))
        return tuple(batches)

    def commit(self, plan: Plan) -> None:
        """Commits a plan. Raises AlreadyExistsError when another process plans the same refresh."""
        key = f"{self.prefix}plans/{plan.number:03d}.json"
        try:
            manifest.commit(self.store, key, KIND, VERSION, plan.model_dump(mode="json"))
        except AlreadyExistsError as error:
            raise AlreadyExistsError(
                f"another refresh of {self.store.url} is at work and has planned meanwhile; run the same command again "
                "when it has ended"
            ) from error

    def refuse(self, candidate: str) -> None:
        """Remembers the candidate that the gate has refused last."""
        self.store.write(f"{self.prefix}{REFUSED}", candidate.encode())

    def refused(self) -> str:
        """The candidate that the gate has refused last; "" when it has refused none."""
        try:
            return self.store.read(f"{self.prefix}{REFUSED}").decode()
        except NotFoundError:
            return ""

    def delete(self) -> None:
        """Forgets the refresh, manifests first."""
        keys = [info.key for info in self.store.list(self.prefix)]
        self.store.delete([key for key in keys if key.endswith(".json")])
        self.store.delete(keys)


def _sized(tables: Iterable[pa.Table], size: int) -> Iterator[pa.Table]:
    waiting = ROWS.empty_table()
    for table in tables:
        waiting = pa.concat_tables([waiting, table])
        while len(waiting) >= size:
            yield waiting.slice(0, size).combine_chunks()
            waiting = waiting.slice(size)
    if len(waiting):
        yield waiting.combine_chunks()


def plan_list(
    config: RefreshConfig,
    ledger: Ledger,
    workspace: Workspace,
    open_plans: list[Plan],
    parent: str | None,
    now: datetime,
    work: Path,
    on_progress: Callable[[int], None],
) -> Plan | None:
    """Plans what of the list is new or due and in no open plan; None when nothing is.

    Raises ConfigError for a list without rows, and for a public host when no contact is configured.
    """
    listed, sources = _spill_list(config, ledger, work, on_progress)
    planned = _spill_planned(workspace.store, open_plans, ledger, work)
    duplicates = sampled = 0

    def selected() -> Iterator[pa.Table]:
        nonlocal duplicates, sampled
        for partition, rows in listed.read():
            chosen, repeated = _select(config, ledger.read(partition), planned.partition(partition), rows, now)
            duplicates += repeated
            sampled += pc.sum(chosen["sampled"]).as_py() or 0
            _check_contact(config, chosen)
            yield chosen

    number = len(open_plans)
    batches = workspace.write_batches(number, selected(), config.batch_size)
    if not batches:
        return None
    plan = Plan(
        number=number,
        moment=now,
        parent=parent,
        batches=batches,
        duplicates=duplicates,
        sampled=sampled,
        sources=sources,
    )
    workspace.commit(plan)
    return plan


def _spill_list(
    config: RefreshConfig, ledger: Ledger, work: Path, on_progress: Callable[[int], None]
) -> tuple[Spill, dict[str, int]]:
    spill, sources = Spill(work / "listed", ledger.partitions), {}
    total = 0
    for file in [config.urls] if config.source != "list" else list_files(config.urls):
        count = 0
        for rows in _read_source(config, file, work):
            keys = pa.array([url_key(url) for url in rows["url"].to_pylist()], pa.string())
            spill.add(rows.append_column("key", keys))
            count += len(rows)
            on_progress(total + count)
        sources[file] = count
        total += count
    if not total:
        raise ConfigError(f"the URL list {config.urls} is empty; give a list with at least one row")
    return spill, sources


def _read_source(config: RefreshConfig, file: str, work: Path) -> Iterator[pa.Table]:
    if config.source == "list":
        return read_rows(file, config.columns(), work)
    return read_samples(file, config.source, config.columns())


def _spill_planned(store: ObjectStore, plans: list[Plan], ledger: Ledger, work: Path) -> Spill:
    spill = Spill(work / "planned", ledger.partitions)
    for plan in plans:
        for batch in plan.batches:
            spill.add(get_table(store, batch.rows).select(["key"]))
    return spill


def _select(
    config: RefreshConfig, known: pa.Table, planned: pa.Table | None, rows: pa.Table, now: datetime
) -> tuple[pa.Table, int]:
    """(rows to ask for with schema ROWS, how many more rows of the list repeat them), within one partition."""
    if planned is not None:
        rows = rows.filter(pc.invert(pc.is_in(rows["key"], planned["key"].combine_chunks())))
    due = known.filter(_due(config, known, now))
    settled = pc.invert(pc.is_in(known["key"], due["key"].combine_chunks()))
    rows = rows.filter(pc.invert(pc.is_in(rows["key"], known.filter(settled)["key"].combine_chunks())))
    keys = rows["key"].to_numpy(zero_copy_only=False)
    first = np.sort(np.unique(keys, return_index=True)[1])
    chosen = rows.take(first)
    place = pc.index_in(chosen["key"], due["key"].combine_chunks())
    history = {name: due[name].combine_chunks().take(place) for name in ("attempts", "dropped", "first_seen")}
    # A duplicate is fetched as if it were new: the picture that it repeated may have gone.
    again = pc.fill_null(pc.is_in(history["dropped"], pa.array(DUPLICATES)), False)
    for name in ("etag", "last_modified", "id"):
        values = due[name].combine_chunks().take(place)
        history[name] = pc.if_else(again, pa.scalar(None, values.type), values)
    columns = {
        **{name: chosen[name] for name in ("key", "url", "caption", "licence", "extra")},
        "attempts": pc.fill_null(history["attempts"], 0),
        "etag": history["etag"],
        "last_modified": history["last_modified"],
        "known_id": history["id"],
        "sampled": pc.and_(pc.is_valid(history["id"]), pc.fill_null(pc.equal(history["dropped"], ""), False)),
        "first_seen": pc.fill_null(history["first_seen"], pa.scalar(now, MOMENT)),
    }
    return pa.table(columns, schema=ROWS), len(rows) - len(chosen)


def _due(config: RefreshConfig, known: pa.Table, now: datetime) -> pa.Array:
    moment = pa.scalar(now, MOMENT)
    retry = pc.and_(pc.equal(known["status"], "retry"), pc.less_equal(known["next_retry"], moment))
    due = pc.fill_null(retry, False)
    # What was taken down stays out; a host may be blocked no more.
    blocked = pc.and_(pc.equal(known["status"], "blocked"), pc.equal(known["reason"], "blocked_host"))
    if pc.any(blocked).as_py():
        due = pc.or_(due, pc.and_(blocked, _unblocked(config, known)))
    if config.revalidate_days is not None:
        oldest = pa.scalar(now - timedelta(days=config.revalidate_days), MOMENT)
        # What a sample was made of is looked after also when its server refused last time.
        sampled = pc.and_(pc.is_valid(known["id"]), pc.equal(known["dropped"], ""))
        asked = pc.or_(pc.equal(known["status"], "ok"), pc.and_(pc.equal(known["status"], "failed"), sampled))
        due = pc.or_(due, pc.and_(asked, pc.less(known["last_seen"], oldest)))
    return due


def _unblocked(config: RefreshConfig, known: pa.Table) -> pa.Array:
    return pa.array([not is_below(host_of(url), config.block_hosts) for url in known["url"].to_pylist()], pa.bool_())


def _check_contact(config: RefreshConfig, rows: pa.Table) -> None:
    if config.contact or config.source != "list":
        return
    own = {entry.lower() for entry in config.allow_host} | {
        entry.lower().rpartition(":")[0] for entry in config.allow_host
    }
    for url in rows["url"].to_pylist():
        host = host_of(url)
        if host and host not in own and url.lower().startswith(("http://", "https://")):
            raise ConfigError(
                f"contact is missing, and {host} is not one of allow_host; set contact=you@example.org, so that "
                "site owners can reach you"
            )
