"""Takedown: a new snapshot without some samples, whose parts are rewritten without their bytes.

Only parts that held such a sample are rewritten, and of these only the touched shards are decoded; the others
are copied. The new snapshot names the parts it withdraws, those that only older snapshots hold included. Until
`starflow.upkeep.collect_garbage` has run, older snapshots and their bytes are still there; afterwards they are gone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from starflow import manifest
from starflow.errors import AlreadyExistsError, NotFoundError
from starflow.latents import MappedShard, encode_shard
from starflow.manifest import ObjectRef
from starflow.objectstore import ObjectStore
from starflow.parts import LayerPlan, PartPlan, complete, create_object, finish_part, text_array, write_tables
from starflow.shardindex import ShardIndex, ShardRef, held_out_candidates, read_index, shard_key
from starflow.snapshots import ArraySpec, Part, Snapshot, load_snapshot, newest_snapshot, publish, snapshot_numbers
from starflow.takedowns import Takedowns

#: Shards rewritten at a time.
THREADS = 4


@dataclass(frozen=True)
class Removal:
    """What a takedown did."""

    snapshot: Snapshot
    removed: int


def take_down(store: ObjectStore, requested: Takedowns) -> Removal:
    """Publishes a snapshot without the samples that `requested` names, and records that they stay out.

    On top of whatever others publish meanwhile. Raises NotFoundError in a store without snapshots.
    """
    while True:
        parent = newest_snapshot(store)
        if parent is None:
            raise NotFoundError(f"{store.url} holds no snapshot; there is nothing to take down")
        recorded = Takedowns.load(store, parent.takedowns)
        parts, withdrawn = [], []
        removed: set[str] = set()
        for part in parent.parts:
            samples = pq.read_table(pa.BufferReader(manifest.get(store, part.samples)))
            blocked = requested.blocks(samples["id"].to_pylist(), samples["url"].to_pylist())
            if not blocked.any():
                parts.append(part)
                continue
            withdrawn.append(part.id)
            removed.update(samples.filter(pa.array(blocked))["id"].to_pylist())
            if not blocked.all():
                parts.append(without(store, part, samples, blocked))
        unwanted = requested | Takedowns(("id", id) for id in removed)  # nor the same bytes under another URL
        withdrawn += _held_before(store, parent, unwanted)
        try:
            snapshot = publish(
                store,
                parent=parent,
                parts=parts,
                image_size=parent.image_size,
                added=0,
                removed={"taken down": len(removed)},
                versions=parent.versions,
                attribution=parent.attribution,
                withdrawn=withdrawn,
                takedowns=(recorded | unwanted).save(store),
            )
        except AlreadyExistsError:
            continue  # somebody published meanwhile: take down from theirs
        return Removal(snapshot, len(removed))


def _held_before(store: ObjectStore, newest: Snapshot, unwanted: Takedowns) -> list[str]:
    """Parts with an unwanted sample that older snapshots hold, `newest` does not, and nobody has withdrawn yet.

    Compaction, and samples that left, replace parts; the old ones stay with the snapshots that hold them.
    """
    seen = {part.id for part in newest.parts} | set(newest.withdrawn)
    found = []
    for number in reversed(snapshot_numbers(store)):
        if number >= newest.number:
            continue
        snapshot = load_snapshot(store, str(number))
        seen |= set(snapshot.withdrawn)  # newer first: a part is withdrawn after the snapshots that hold it
        for part in snapshot.parts:
            if part.id in seen:
                continue
            seen.add(part.id)
            samples = pq.read_table(pa.BufferReader(manifest.get(store, part.samples)), columns=["id", "url"])
            if unwanted.blocks(samples["id"].to_pylist(), samples["url"].to_pylist()).any():
                found.append(part.id)
    return found


def without(store: ObjectStore, part: Part, samples: pa.Table, blocked: NDArray[np.bool_]) -> Part:
    """A copy of `part` in which the blocked samples (a mask over `samples`, the part's table) are holes of zeros."""
    removed = samples.filter(pa.array(blocked))
    layers = [layer.captions.sha256 for layer in part.captions]  # other layers may have been added to the same part
    digest = hashlib.sha256("\n".join([part.id, *layers, *sorted(removed["id"].to_pylist())]).encode())
    texts = {text_array(number): layer.text for number, layer in enumerate(part.captions) if layer.text}
    specs = dict(part.arrays) | {name: text.spec for name, text in texts.items()}
    plan = PartPlan(
        id=digest.hexdigest()[:24],
        grid=part.grid,
        rows=part.rows,
        chunk=part.chunk,
        shard=part.shard,
        arrays=specs,
        layers=tuple(
            LayerPlan(origin=c.origin, version=c.version, weight=c.weight, text=c.text.encoder if c.text else None)
            for c in part.captions
        ),
        vae=part.vae,
    )
    old = {name: (name, _index(store, part, part.index)) for name in part.arrays}
    old |= {name: (text.array, _index(store, part, text.index)) for name, text in texts.items()}
    kept = samples.filter(pa.array(~blocked))
    removed_rows = removed["row"].to_numpy()
    ids = _ids(plan, kept)
    holes = [[row for row, id in enumerate(each) if id is None] for each in ids]
    tables = write_tables(store, plan, holes, _tables(store, part, plan, kept))
    with ThreadPoolExecutor(THREADS) as pool:
        refs = pool.map(lambda n: _rewrite_shard(store, plan, old, n, removed_rows, ids[n]), range(plan.shards))
        return finish_part(store, plan, list(refs), tables)


def _ids(plan: PartPlan, kept: pa.Table) -> list[list[str | None]]:
    """The id of every row of each shard, None for a hole."""
    ids: list[str | None] = [None] * plan.rows
    for row, id in zip(kept["row"].to_pylist(), kept["id"].to_pylist(), strict=True):
        ids[row] = id
    return [ids[first : first + plan.shard] for first in range(0, plan.rows, plan.shard)]


def _index(store: ObjectStore, part: Part, index: ObjectRef) -> ShardIndex:
    return read_index(part.id, manifest.get(store, index), part.shard)


def _rewrite_shard(
    store: ObjectStore,
    plan: PartPlan,
    old: dict[str, tuple[str, ShardIndex]],
    shard: int,
    removed: NDArray[np.int64],
    ids: Sequence[str | None],
) -> ShardRef:
    """`old` says, for each array of the plan, what it is called in the old part, and where its shards lie."""
    first, rows = shard * plan.shard, plan.shard_rows(shard)
    here = removed[(removed >= first) & (removed < first + rows)] - first
    objects = {}
    for name, spec in plan.arrays.items():
        array, index = old[name]
        ref = index.object(array, shard, len(spec.shape))
        data = manifest.get(store, ref)
        if len(here):
            data = _zeroed(data, spec, rows, plan, here, ref.key)
        objects[name] = create_object(store, shard_key(plan.id, name, shard, len(spec.shape)), data)
    holes = tuple(row for row, id in enumerate(ids) if id is None)
    return ShardRef(index=shard, rows=rows, objects=objects, holes=holes, candidates=held_out_candidates(ids))


def _zeroed(data: bytes, spec: ArraySpec, rows: int, plan: PartPlan, here: NDArray[np.int64], key: str) -> bytes:
    values = np.empty((rows, *spec.shape[1:]), spec.dtype)
    MappedShard(data, spec, rows, plan.chunk, plan.shard, key).gather(np.arange(rows), values)
    values[here] = 0
    return encode_shard(values, plan.chunk, plan.shard)


def _tables(store: ObjectStore, part: Part, plan: PartPlan, kept: pa.Table) -> Iterator[pa.Table]:
    """The tables that `write_tables` wants: every row of each shard, null where there is no sample."""
    captions = [pq.read_table(pa.BufferReader(manifest.get(store, layer.captions))) for layer in part.captions]
    place = np.full(plan.rows, -1)
    place[kept["row"].to_numpy()] = np.arange(len(kept))
    for shard in range(plan.shards):
        first = shard * plan.shard
        chosen = place[first : first + plan.shard_rows(shard)]
        table = complete(kept).take(pa.array(chosen, mask=chosen < 0))
        for number, layer in enumerate(captions):
            table = table.append_column(f"caption:{number}", layer["caption"].slice(first, len(chosen)))
        yield table
