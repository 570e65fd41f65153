"""Compaction: the small parts that nightly refreshes leave become few large ones, sample for sample the same.

A reader maps a few hundred shards at a time, so a snapshot of thousands of small shards reads slowly. Neighbouring
small parts of one grid, with the same caption layers, are copied into one part of whole shards; large parts stay.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from starflow import manifest
from starflow.errors import AlreadyExistsError, NotFoundError
from starflow.latents import MappedShard
from starflow.objectstore import ObjectStore
from starflow.parts import (
    CHUNK_BYTES,
    PART_SHARDS,
    SHARD_BYTES,
    LayerPlan,
    PartPlan,
    complete,
    finish_part,
    plan_part,
    text_array,
    write_shard,
    write_tables,
)
from starflow.shardindex import MAX_SHARD_ROWS, read_index
from starflow.snapshots import ArraySpec, Part, Snapshot, newest_snapshot, publish

#: The arrays of a part: of its latents, and of the text states of each layer that has them.
Arrays = dict[str, NDArray[np.float16]]


@dataclass(frozen=True)
class Compaction:
    """What a compaction did; `snapshot` is the one that was there when there was nothing to merge."""

    snapshot: Snapshot
    before: int
    after: int


def compact(store: ObjectStore, shard_bytes: int = SHARD_BYTES, chunk_bytes: int = CHUNK_BYTES) -> Compaction:
    """Publishes the newest snapshot with neighbouring small parts (less than a full shard) merged.

    On top of whatever others publish meanwhile. The old parts go with the snapshots that hold them, by garbage
    collection. Raises NotFoundError in a store without snapshots.
    """
    while True:
        parent = newest_snapshot(store)
        if parent is None:
            raise NotFoundError(f"{store.url} holds no snapshot; there is nothing to compact")
        groups = _groups(parent.parts, shard_bytes)
        parts = [_merge(store, group, shard_bytes, chunk_bytes) if len(group) > 1 else group[0] for group in groups]
        try:
            snapshot = publish(
                store,
                parent=parent,
                parts=parts,
                image_size=parent.image_size,
                added=0,
                versions=parent.versions,
                attribution=parent.attribution,
            )
        except AlreadyExistsError:
            continue  # somebody published meanwhile: merge what is there now; finished parts are found again
        return Compaction(snapshot, len(parent.parts), len(parts))


def _groups(parts: Sequence[Part], shard_bytes: int) -> list[list[Part]]:
    """The parts, those to be merged in one list; an open group of each kind takes small parts until it is full."""
    groups: list[list[Part]] = []
    open_groups: dict[object, list[Part]] = {}
    for part in parts:
        full = min(shard_bytes // _row_bytes(part), MAX_SHARD_ROWS)
        kind = (part.grid, tuple((layer.origin, layer.version, layer.weight, _states(part, i))
                                 for i, layer in enumerate(part.captions)))  # fmt: skip
        group = open_groups.get(kind)
        if part.rows >= full:
            groups.append([part])
        elif group is not None and sum(each.rows for each in group) + part.rows <= full * PART_SHARDS:
            group.append(part)
        else:
            open_groups[kind] = [part]
            groups.append(open_groups[kind])
    return groups


def _row_bytes(part: Part) -> int:
    return max(2 * int(np.prod(spec.shape[1:])) for spec in _specs(part).values())


def _states(part: Part, layer: int) -> tuple[object, ...] | None:
    text = part.captions[layer].text
    return (text.encoder, text.spec.shape[1:]) if text else None


def _specs(part: Part) -> dict[str, ArraySpec]:
    """The part's arrays, by the names that they get in a new one."""
    texts = {text_array(number): layer.text.spec for number, layer in enumerate(part.captions) if layer.text}
    return dict(part.arrays) | texts


def _merge(store: ObjectStore, group: Sequence[Part], shard_bytes: int, chunk_bytes: int) -> Part:
    """One part with the samples of all, in order, without their holes."""
    content = hashlib.sha256()
    for part in group:
        content.update(f"{part.id} {[layer.captions.sha256 for layer in part.captions]}\n".encode())
    layers = [
        LayerPlan(origin=c.origin, version=c.version, weight=c.weight, text=c.text.encoder if c.text else None)
        for c in group[0].captions
    ]
    shapes = [layer.text.spec.shape[1:] for layer in group[0].captions if layer.text]
    table = pa.concat_tables([_table(store, part) for part in group])
    plan = plan_part(
        content.hexdigest(), group[0].grid, len(table), group[0].vae, layers,
        (shapes[0][0], shapes[0][1]) if shapes else None, chunk_bytes, shard_bytes,
    )  # fmt: skip
    spans = [slice(k * plan.shard, k * plan.shard + plan.shard_rows(k)) for k in range(plan.shards)]
    ids = table["id"].to_pylist()
    slices = (table.slice(span.start, span.stop - span.start) for span in spans)
    tables = write_tables(store, plan, [()] * plan.shards, slices)
    refs = [
        write_shard(store, plan, number, arrays, ids[span])
        for number, (span, arrays) in enumerate(zip(spans, _shards(store, group, plan), strict=True))
    ]
    return finish_part(store, plan, refs, tables)


def _table(store: ObjectStore, part: Part) -> pa.Table:
    """Samples and captions of the part's valid rows, as `write_tables` wants them."""
    samples = pq.read_table(pa.BufferReader(manifest.get(store, part.samples)))
    table = complete(samples)
    for number, layer in enumerate(part.captions):
        captions = pq.read_table(pa.BufferReader(manifest.get(store, layer.captions)))["caption"]
        table = table.append_column(f"caption:{number}", captions.take(samples["row"].combine_chunks()))
    return table


def _shards(store: ObjectStore, group: Sequence[Part], plan: PartPlan) -> Iterator[Arrays]:
    """The arrays of each shard of the new part."""
    waiting: Arrays = {name: np.empty((0, *spec.shape[1:]), np.float16) for name, spec in plan.arrays.items()}
    for part in group:
        found = _valid_rows(store, part)
        waiting = {name: np.concatenate([rows, found[name]]) for name, rows in waiting.items()}
        while len(waiting["mean"]) >= plan.shard:
            yield {name: rows[: plan.shard] for name, rows in waiting.items()}
            waiting = {name: rows[plan.shard :] for name, rows in waiting.items()}
    if len(waiting["mean"]):
        yield waiting


def _valid_rows(store: ObjectStore, part: Part) -> Arrays:
    """The arrays of a small part, without its holes."""
    index = read_index(part.id, manifest.get(store, part.index), part.shard)
    places = {name: (name, index) for name in part.arrays}
    for number, layer in enumerate(part.captions):
        if layer.text:
            text = read_index(part.id, manifest.get(store, layer.text.index), part.shard)
            places[text_array(number)] = (layer.text.array, text)
    valid = np.ones(part.rows, bool)
    valid[index.holes] = False
    arrays = {}
    for name, spec in _specs(part).items():
        old, where = places[name]
        rows = np.empty((part.rows, *spec.shape[1:]), np.float16)
        for shard in range(len(where.rows)):
            ref = where.object(old, shard, len(spec.shape))
            here = rows[shard * part.shard : (shard + 1) * part.shard]
            mapped = MappedShard(manifest.get(store, ref), spec, len(here), part.chunk, part.shard, ref.key)
            mapped.gather(np.arange(len(here)), here)
        arrays[name] = rows[valid]
    return arrays
