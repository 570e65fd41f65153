"""Encodes sample tables into parts of a snapshot, on Ray.

First a plan of whole shards with fixed members is stored; then each call to an actor makes one shard. Plan and
finished shards make it resumable: the same call again goes on where any kill stopped it, a shard whose actor
died is given to another, and a shard finished twice is the same shard.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa

from pipelines.actors import ActorPool, Resources, actor_pool
from pipelines.encode_plan import EncodeConfig, EncodePlan, PlannedPart, load_plan, make_plan
from pipelines.encode_shard import EncodedShard, ShardEncoder, load_marker, marker_key, read_members
from starflow import manifest
from starflow.config import Config
from starflow.objectstore import ObjectStore
from starflow.parts import finish_part
from starflow.snapshots import Part, newest_snapshot
from starflow.takedowns import Takedowns

#: Called with (shards finished, shards in all).
Progress = Callable[[int, int], None]

PART_KIND, PART_VERSION = "encoded-part", 1


class EncodeResult(Config):
    """The parts made of some sample tables, and how many samples were dropped for which reason."""

    parts: tuple[Part, ...]
    dropped: dict[str, int]


def encode(
    store: ObjectStore,
    tables: Sequence[str],
    config: EncodeConfig,
    work: str,
    on_progress: Progress | None = None,
) -> EncodeResult:
    """Encodes the sample tables at keys `tables` into parts; `work` is a key prefix for this call's records.

    Calling it again with the same arguments goes on where it stopped and returns the same parts. Nothing it
    writes is visible to readers until a snapshot names the parts. Raises ActorError or StoreError.
    """
    newest = newest_snapshot(store)
    removed = newest.takedowns if newest else None
    # A plan made before a takedown would bring back what was taken down: each takedown has plans of its own. They share
    # finished shards: a part's name follows from its content.
    own = f"{work}/{removed.sha256[:16] if removed else 'all'}"
    plan = load_plan(store, own, tables, config)
    done = _finished(store, work, plan)
    if plan is None or len(done) < _shards(plan):
        resources = Resources(config.actors, config.cpus_per_actor, config.gpus_per_actor, config.address)
        with actor_pool(ShardEncoder, resources, store.url, config, work) as actors:
            models = actors.ask("models")
            if plan is None:
                plan = make_plan(store, own, tables, config, models, Takedowns.load(store, removed))
                done = _finished(store, work, plan)
            while len(done) < _shards(plan):  # once more for what garbage collection has taken meanwhile
                _run(actors, plan, done, on_progress)
                done = _finished(store, work, plan)
    dropped = Counter(plan.dropped)
    parts = []
    for planned in plan.parts:
        shards = [done[planned.plan.id, index] for index in range(planned.plan.shards)]
        for shard in shards:
            dropped.update(shard.dropped)
        part = _finish(store, work, planned, shards)
        if part.count:
            parts.append(part)
    return EncodeResult(parts=tuple(parts), dropped=dict(sorted(dropped.items())))


def _shards(plan: EncodePlan) -> int:
    return sum(part.plan.shards for part in plan.parts)


def _finished(store: ObjectStore, work: str, plan: EncodePlan | None) -> dict[tuple[str, int], EncodedShard]:
    """The records of the plan's finished shards, as far as their objects are there.

    They may be gone: a refresh left alone for long is garbage, whose objects are collected.
    """
    found: dict[tuple[str, int], EncodedShard] = {}
    markers = {info.key for info in store.list(f"{work}/shards/")} if plan else set()
    for planned in plan.parts if plan else ():
        part = planned.plan.id
        present = {info.key for info in store.list(f"parts/{part}/")}
        for index in range(planned.plan.shards):
            if marker_key(work, part, index) not in markers:
                continue
            shard = load_marker(store, work, part, index)
            if present.issuperset(ref.key for ref in shard.ref.objects.values()):
                found[part, index] = shard
            else:
                store.delete([marker_key(work, part, index)])
    return found


def _run(
    actors: ActorPool, plan: EncodePlan, done: dict[tuple[str, int], EncodedShard], on_progress: Progress | None
) -> None:
    """Has every unfinished shard made."""
    jobs = [
        (part, index) for part in plan.parts for index in range(part.plan.shards) if (part.plan.id, index) not in done
    ]
    total = _shards(plan)
    for finished, _ in enumerate(actors.map("encode", jobs), start=total - len(jobs) + 1):
        if on_progress is not None:
            on_progress(finished, total)


def _finish(store: ObjectStore, work: str, planned: PlannedPart, shards: Sequence[EncodedShard]) -> Part:
    """Completes a part, or returns what an earlier call has completed."""
    key = f"{work}/parts/{planned.plan.id}.json"
    if store.head(key) is not None:
        part = Part.model_validate(manifest.load(store, key, PART_KIND, PART_VERSION))
        if store.head(part.samples.key) is not None:
            return part
        store.delete([key])  # collected as garbage; see _finished
    part = finish_part(store, planned.plan, [shard.ref for shard in shards], _member_tables(store, planned))
    manifest.commit(store, key, PART_KIND, PART_VERSION, part.model_dump(mode="json"))
    return part


def _member_tables(store: ObjectStore, planned: PlannedPart) -> Iterator[pa.Table]:
    file = read_members(store, planned)
    return (file.read_row_group(index) for index in range(planned.plan.shards))
