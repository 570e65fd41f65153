"""Encodes sample tables into parts of a snapshot, on Ray.

First a plan of whole shards with fixed members is stored; then each call to an actor makes one shard. Plan and
finished shards make it resumable: the same call again goes on where any kill stopped it, a shard whose actor
died is given to another, and a shard finished twice is the same shard. This is the only module that knows Ray.
"""

from __future__ import annotations

import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from pipelines.encode_plan import EncodeConfig, EncodePlan, Models, PlannedPart, load_plan, make_plan
from pipelines.encode_shard import EncodedShard, ShardEncoder, load_marker, marker_key, read_members
from starflow import manifest
from starflow.config import Config
from starflow.errors import StarflowError
from starflow.objectstore import ObjectStore
from starflow.parts import finish_part
from starflow.snapshots import Part, newest_snapshot
from starflow.takedowns import Takedowns

#: Called with (shards finished, shards in all).
Progress = Callable[[int, int], None]

PART_KIND, PART_VERSION = "encoded-part", 1
#: A shard whose actors died this often is given up: it probably needs more memory than there is.
ATTEMPTS = 3
#: Seconds that a cluster may take to start an actor and load its encoders.
START_SECONDS = 600.0
#: Shards in work by one actor: while one is encoded the other is read or written.
SHARDS_PER_ACTOR = 2


class EncodeError(StarflowError):
    """Encoding that cannot go on."""


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
    writes is visible to readers until a snapshot names the parts. Raises EncodeError or StoreError.
    """
    newest = newest_snapshot(store)
    removed = newest.takedowns if newest else None
    # A plan made before a takedown would bring back what was taken down: each takedown has plans of its own.
    work = f"{work}/{removed.sha256[:16] if removed else 'all'}"
    plan = load_plan(store, work, tables, config)
    done = _finished(store, work, plan)
    if plan is None or len(done) < _shards(plan):
        with _actors(store, config, work) as actors:
            models = actors.models()
            if plan is None:
                plan = make_plan(store, work, tables, config, models, Takedowns.load(store, removed))
                done = _finished(store, work, plan)
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
    actors: _Actors, plan: EncodePlan, done: dict[tuple[str, int], EncodedShard], on_progress: Progress | None
) -> None:
    """Has every unfinished shard made."""
    waiting = deque(
        (part, index) for part in plan.parts for index in range(part.plan.shards) if (part.plan.id, index) not in done
    )
    attempts: Counter[tuple[str, int]] = Counter()
    total = _shards(plan)
    finished = total - len(waiting)
    running: dict[ray.ObjectRef, tuple[ActorHandle, PlannedPart, int]] = {}
    while waiting or running:
        while waiting and (actor := actors.free([actor for actor, _, _ in running.values()])) is not None:
            part, index = waiting.popleft()
            running[actor.encode.remote(part, index)] = (actor, part, index)
        ready, _ = ray.wait(list(running), num_returns=1)
        actor, part, index = running.pop(ready[0])
        try:
            ray.get(ready[0])
        except RayActorError as error:
            attempts[part.plan.id, index] += 1
            if attempts[part.plan.id, index] >= ATTEMPTS:
                raise EncodeError(
                    f"shard {index} of part {part.plan.id} failed {ATTEMPTS} times because its actor died "
                    f"({error}); give actors more memory, or set a smaller vae_batch or shard_bytes"
                ) from error
            actors.replace(actor)
            waiting.appendleft((part, index))
        except RayTaskError as error:
            raise _cause(error) from None
        else:
            finished += 1
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


class _Actors:
    """A few encoders on Ray, each replaced when it dies."""

    def __init__(self, count: int, start: Callable[[], ActorHandle]) -> None:
        self._start = start
        self._actors = [start() for _ in range(count)]

    def models(self) -> Models:
        """Has all actors load their encoders; returns what these say of themselves."""
        try:
            models: list[Models] = ray.get([actor.models.remote() for actor in self._actors], timeout=START_SECONDS)
        except GetTimeoutError as error:
            raise EncodeError(
                f"the Ray cluster started no {len(self._actors)} encoders within {START_SECONDS:.0f} s; it may have "
                "too few free CPUs or GPUs: see `ray status`, and lower actors, cpus_per_actor or gpus_per_actor"
            ) from error
        except RayTaskError as error:
            raise _cause(error) from None
        except RayActorError as error:
            raise EncodeError(f"an encoder died while starting, perhaps for lack of memory: {error}") from error
        return models[0]

    def free(self, busy: Sequence[ActorHandle]) -> ActorHandle | None:
        """The actor with the least work in hand, if it can take more."""
        actor = min(self._actors, key=lambda actor: busy.count(actor))
        return actor if busy.count(actor) < SHARDS_PER_ACTOR else None

    def replace(self, dead: ActorHandle) -> None:
        """Starts another actor in the place of `dead`, unless that has been done."""
        if dead in self._actors:
            self._actors[self._actors.index(dead)] = self._start()


def _cause(error: RayTaskError) -> Exception:
    """The error raised in the actor, where it is one of ours."""
    return error.cause if isinstance(error.cause, StarflowError) else error


@contextmanager
def _actors(store: ObjectStore, config: EncodeConfig, work: str) -> Iterator[_Actors]:
    """Actors on the configured cluster; one that was started here is stopped again."""
    own = not ray.is_initialized()
    if own:
        _connect(config)
    try:
        encoder: Any = ray.remote(ShardEncoder).options(
            num_cpus=config.cpus_per_actor, num_gpus=config.gpus_per_actor, max_concurrency=SHARDS_PER_ACTOR
        )
        yield _Actors(config.actors, lambda: encoder.remote(store.url, config, work))
    finally:
        if own:
            ray.shutdown()


def _connect(config: EncodeConfig) -> None:
    """Joins the cluster, or starts one of just the resources that the actors need, on the loopback interface."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if config.address is not None:
        try:
            ray.init(address=config.address, log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            raise EncodeError(
                f"no Ray cluster at address {config.address!r}; start one with `ray start --head`, or leave address out"
            ) from error
        return
    ray.init(
        address="local",
        num_cpus=config.actors * config.cpus_per_actor,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address="127.0.0.1",
        object_store_memory=100 * 2**20,  # results are a few hundred bytes; shards go straight to the store
    )
