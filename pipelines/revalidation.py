"""What becomes of a picture that a refresh has before and asks for again: it stays, or it leaves the next snapshot.

A server that is down, slow or refuses us says nothing about the picture, nor does a page in its place, such as a notice
of maintenance. 404, 410 and 451 do, an opt-out does, and so does another picture than it gave before.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.ledger import SCHEMA, Ledger
from starflow import manifest
from starflow.objectstore import ObjectStore
from starflow.removal import without
from starflow.snapshots import Part, Snapshot

#: HTTP statuses that say a picture is there no more, or not for us (RFC 9110, RFC 7725).
GONE = (404, 410, 451)
#: Pictures that URLs gave before and give no more: samples that leave, and why.
LEFT = pa.schema([("id", pa.string()), ("reason", pa.string())])


def left_rows(fetched: pa.Table) -> pa.Table:
    """The samples (schema LEFT) that leave because of what their URLs have answered."""
    status = fetched["status"]
    failed = pc.equal(status, "failed")
    reason = pc.if_else(pc.equal(status, "opt_out"), "opted_out", "")
    reason = pc.if_else(pc.equal(status, "ok"), "changed", reason)
    gone = pc.and_(failed, pc.is_in(fetched["http"], pa.array(GONE, pa.int16())))
    reason = pc.if_else(gone, "gone", reason)
    leaves = pc.and_(fetched["sampled"], pc.not_equal(reason, ""))
    return pa.table({"id": fetched["known_id"], "reason": reason}, schema=LEFT).filter(leaves)


def without_left(store: ObjectStore, parent: Snapshot, left: pa.Table) -> tuple[list[Part], dict[str, int]]:
    """(the parent's parts without the samples that left, rewritten where they held one; how many left, by reason)."""
    if not len(left):
        return list(parent.parts), {}
    ids, reasons = left["id"].combine_chunks(), left["reason"]
    parts: list[Part] = []
    removed: Counter[str] = Counter()
    for part in parent.parts:
        samples = pq.read_table(pa.BufferReader(manifest.get(store, part.samples)))
        place = pc.index_in(samples["id"].combine_chunks(), ids)
        removed.update(reasons.take(place.drop_null()).to_pylist())
        leaving = pc.is_valid(place).to_numpy(zero_copy_only=False)
        if not leaving.any():
            parts.append(part)
        elif not leaving.all():
            parts.append(without(store, part, samples, leaving))
    return parts, dict(sorted(removed.items()))


def with_history(ledger: Ledger, partition: int, rows: pa.Table) -> pa.Table:
    """`rows` (SCHEMA and a column `stays`) as ledger rows: what stays keeps what the ledger knows of its content.

    Status ``unchanged`` becomes ok.
    """
    if not pc.any(rows["stays"]).as_py():
        return rows.select(SCHEMA.names)
    old = ledger.read(partition)
    place = pc.index_in(rows["key"].combine_chunks(), old["key"].combine_chunks())
    same = pc.equal(rows["status"], "unchanged")
    columns: dict[str, Any] = {name: rows[name] for name in SCHEMA.names}
    for name in ("etag", "last_modified"):  # newer ones come with the same bytes as well
        columns[name] = pc.coalesce(rows[name], _taken(old, name, place))
    for name in ("id", "phash", "dropped"):
        columns[name] = pc.if_else(rows["stays"], _taken(old, name, place), rows[name])
    columns["status"] = pc.if_else(same, "ok", rows["status"])
    columns["reason"] = pc.if_else(same, "", rows["reason"])
    return pa.table(columns, schema=SCHEMA)


def _taken(table: pa.Table, name: str, place: pa.Array) -> pa.Array:
    return table[name].combine_chunks().take(place)
