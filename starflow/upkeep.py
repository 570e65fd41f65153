"""Looking after a store of snapshots: what changed between two, whether all is there, what can go."""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from starflow import manifest
from starflow.config import Config
from starflow.errors import CorruptError, NotFoundError
from starflow.manifest import ObjectRef
from starflow.objectstore import ObjectStore
from starflow.shardindex import read_index
from starflow.snapshots import (
    KIND,
    VERSION,
    Part,
    Snapshot,
    load_snapshot,
    part_list_ref,
    snapshot_key,
    snapshot_numbers,
)

#: Objects looked at in parallel.
THREADS = 8
#: What garbage collection remembers between runs: unreferenced things and since when.
MARKS = "gc/marks.json"


class Difference(Config):
    """From one snapshot to another, in samples and parts."""

    old: str
    new: str
    added: int
    removed: int
    total: tuple[int, int]
    parts_added: tuple[str, ...]
    parts_removed: tuple[str, ...]
    grids: dict[str, tuple[int, int]]


def difference(store: ObjectStore, old: Snapshot, new: Snapshot) -> Difference:
    """Compares by sample id; parts that both have are not read."""
    old_parts, new_parts = ({part.id: part for part in snapshot.parts} for snapshot in (old, new))
    gone = [part for id, part in old_parts.items() if id not in new_parts]
    come = [part for id, part in new_parts.items() if id not in old_parts]
    old_ids, new_ids = _ids(store, gone), _ids(store, come)
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for side, snapshot in enumerate((old, new)):
        for part in snapshot.parts:
            counts[f"{part.grid[0]}x{part.grid[1]}"][side] += part.count
    return Difference(
        old=old.id,
        new=new.id,
        added=len(np.setdiff1d(new_ids, old_ids)),
        removed=len(np.setdiff1d(old_ids, new_ids)),
        total=(old.counts.total, new.counts.total),
        parts_added=tuple(part.id for part in come),
        parts_removed=tuple(part.id for part in gone),
        grids={grid: (before, after) for grid, (before, after) in sorted(counts.items())},
    )


def _ids(store: ObjectStore, parts: Iterable[Part]) -> NDArray[np.uint64]:
    """The first 64 bits of each sample's id: enough to compare, an eighth of the memory."""
    found = [np.empty(0, np.uint64)]
    for part in parts:
        ids = pq.read_table(io.BytesIO(manifest.get(store, part.samples)), columns=["id"])["id"].to_pylist()
        found.append(np.array([int(id[:16], 16) for id in ids], np.uint64))
    return np.concatenate(found)


def verify(store: ObjectStore, snapshot: Snapshot, read: bool = False) -> list[str]:
    """Problems of a snapshot's objects, one sentence each; none means that all is there.

    Sizes are compared with a listing; with `read`, every byte is read and its checksum compared.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda part: _verify_part(store, part, read), snapshot.parts)
        return [problem for problems in found for problem in problems]


def _verify_part(store: ObjectStore, part: Part, read: bool) -> list[str]:
    sizes = {info.key: info.size for info in store.list(f"parts/{part.id}/")}
    try:
        refs = _objects(store, part)
    except (CorruptError, NotFoundError) as error:
        return [str(error)]
    metadata = [f"parts/{part.id}/{folder}zarr.json" for folder in ("", *(f"{array}/" for array in part.arrays))]
    problems = [f"{key} is missing" for key in metadata if key not in sizes]
    for ref in refs:
        if ref.key not in sizes:
            problems.append(f"{ref.key} is missing")
        elif sizes[ref.key] != ref.size:
            problems.append(f"{ref.key} has {sizes[ref.key]} bytes instead of {ref.size}")
        elif read:
            try:
                manifest.get(store, ref)
            except (CorruptError, NotFoundError) as error:
                problems.append(str(error))
    return problems


def _objects(store: ObjectStore, part: Part) -> list[ObjectRef]:
    """Every object with a checksum that a part consists of."""
    refs = [part.index, part.samples]
    indices = [(part.index, part.arrays)]
    for layer in part.captions:
        refs.append(layer.captions)
        if layer.text:
            refs.append(layer.text.index)
            indices.append((layer.text.index, {layer.text.array: layer.text.spec}))
    for ref, arrays in indices:
        index = read_index(part.id, manifest.get(store, ref), part.shard)
        for name, spec in arrays.items():
            refs += [index.object(name, shard, len(spec.shape)) for shard in range(len(index.rows))]
    return refs


class Garbage(Config):
    """What garbage collection deleted, or would delete."""

    snapshots: tuple[str, ...]
    groups: tuple[str, ...]
    objects: int
    bytes: int
    waiting: tuple[str, ...]


def collect_garbage(
    store: ObjectStore, keep: int | None = None, grace_hours: float = 168.0, dry_run: bool = False
) -> Garbage:
    """Deletes old snapshots, and what no snapshot refers to.

    Snapshots go when they are older than the newest `keep` (None: all stay), or hold parts that a later takedown
    withdrew; the newest always stays. Withdrawn parts go at once. Other unreferenced objects may belong to a
    refresh at work: they go when a run `grace_hours` ago (longer than any refresh takes) has seen them
    unreferenced already.
    """
    heads = [_Head.load(store, number) for number in snapshot_numbers(store)]
    withdrawn = {f"parts/{part}/" for head in heads for part in head.withdrawn}
    first_kept = len(heads) - max(keep, 1) if keep is not None else 0
    going = [
        head
        for position, head in enumerate(heads[:-1])
        if position < first_kept or not withdrawn.isdisjoint(head.groups)
    ]
    referenced = {group for head in heads if head not in going for group in head.groups}
    at_once = withdrawn | {head.part_list for head in going}
    unreferenced = {group: size for group, size in _groups(store).items() if group not in referenced}
    ripe, waiting = _ripe(store, unreferenced, at_once, grace_hours, dry_run)
    if not dry_run:
        store.delete([snapshot_key(head.number) for head in going])  # manifests before what they name
        for group in ripe:
            store.delete([info.key for info in store.list(group)])
    return Garbage(
        snapshots=tuple(head.id for head in going),
        groups=tuple(sorted(ripe)),
        objects=sum(unreferenced[group][0] for group in ripe),
        bytes=sum(unreferenced[group][1] for group in ripe),
        waiting=tuple(sorted(waiting)),
    )


@dataclass(frozen=True)
class _Head:
    """What garbage collection needs of a snapshot: far less than all its parts."""

    id: str
    number: int
    part_list: str
    withdrawn: tuple[str, ...]
    groups: frozenset[str]

    @classmethod
    def load(cls, store: ObjectStore, number: int) -> _Head:
        part_list = part_list_ref(manifest.load(store, snapshot_key(number), KIND, VERSION)).key
        snapshot = load_snapshot(store, str(number))
        groups = {part_list, *(f"parts/{part.id}/" for part in snapshot.parts)}
        if snapshot.takedowns:
            groups.add(snapshot.takedowns.key)
        return cls(snapshot.id, number, part_list, snapshot.withdrawn, frozenset(groups))


def _groups(store: ObjectStore) -> dict[str, tuple[int, int]]:
    """(objects, bytes) of everything that snapshots can refer to: a part is one group, a list another."""
    found: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for prefix in ("parts/", "partlists/", "takedowns/"):
        for info in store.list(prefix):
            group = "/".join(info.key.split("/")[:2]) + "/" if prefix == "parts/" else info.key
            objects, size = found[group]
            found[group] = (objects + 1, size + info.size)
    return found


def _ripe(
    store: ObjectStore, unreferenced: Iterable[str], at_once: set[str], grace_hours: float, dry_run: bool
) -> tuple[list[str], list[str]]:
    """Splits into what may go now and what has to wait, and remembers since when it waits."""
    now = datetime.now(UTC)
    try:
        seen: dict[str, str] = json.loads(store.read(MARKS))
    except NotFoundError:
        seen = {}
    marks = {group: seen.get(group, now.isoformat()) for group in unreferenced}
    limit = now - timedelta(hours=grace_hours)
    ripe = [g for g, since in marks.items() if g in at_once or datetime.fromisoformat(since) <= limit]
    waiting = [group for group in marks if group not in set(ripe)]
    if not dry_run:
        store.write(MARKS, json.dumps({group: marks[group] for group in waiting}, indent=1).encode())
    return ripe, waiting
