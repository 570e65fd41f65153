"""Looking after a store of snapshots: what changed between two, whether all is there, what can go."""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field

from starflow import manifest
from starflow.config import Config
from starflow.errors import CorruptError, NotFoundError
from starflow.objectstore import ObjectStore
from starflow.parts import samples_key
from starflow.snapshots import (
    KIND,
    VERSION,
    Part,
    Snapshot,
    list_snapshots,
    load_snapshot,
    part_list_ref,
    part_objects,
    snapshot_key,
    snapshot_numbers,
)
from starflow.takedowns import Takedowns

#: Objects looked at in parallel.
THREADS = 8
#: What garbage collection remembers between runs: unreferenced things and since when.
MARKS = "gc/marks.json"
#: A single write that is older than this has died.
UNFINISHED_SECONDS = 86400.0
_FOR_EVER = datetime.min.replace(tzinfo=UTC)


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
        refs = part_objects(store, part)
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


class Garbage(Config):
    """What garbage collection deleted, or would delete."""

    snapshots: tuple[str, ...]
    withdrawn: tuple[str, ...] = Field(description="Those of the snapshots that hold parts a takedown withdrew.")
    groups: tuple[str, ...] = Field(description="Parts (a folder), caption layers of parts, lists: key prefixes.")
    objects: int
    bytes: int
    waiting: tuple[str, ...] = Field(description="Unreferenced groups that somebody may be writing.")
    due: str | None = Field(description="ISO 8601, UTC: a run from then on deletes all that waits.")
    unfinished: int = Field(description="Writes that died half-way, swept.")


#: Which of the parts without a table (nobody has finished them) will never be published: (their ids, takedowns).
Hopeless = Callable[[Collection[str], Takedowns], set[str]]


def collect_garbage(
    store: ObjectStore,
    keep: int | None = None,
    grace_hours: float = 168.0,
    dry_run: bool = False,
    hopeless: Hopeless = lambda parts, takedowns: set(),
) -> Garbage:
    """Deletes old snapshots, and what no snapshot refers to: parts, caption layers, lists, writes that died.

    Snapshots go when they are older than the newest `keep` (None: all stay), or hold parts that a later takedown
    withdrew; the newest always stays. Withdrawn parts go at once, and unreferenced ones with a sample that was taken
    down, and the `hopeless`. Other unreferenced objects may belong to work in progress: they go when a run
    `grace_hours` ago (longer than a refresh takes, its gate included) has seen them unreferenced already.

    Killed at any moment, the same call again ends the same: what goes is recorded before the first deletion.
    """
    heads = list_snapshots(store)
    withdrawn = {f"parts/{part}/" for head in heads for part in head.withdrawn}
    first_kept = len(heads) - max(keep, 1) if keep is not None else 0
    going: list[_Going] = []
    referenced: set[str] = set()
    for position, head in enumerate(heads):
        part_list, named = _named(store, head.number)
        tainted = not withdrawn.isdisjoint(named)
        if position < first_kept or (tainted and head is not heads[-1]):
            going.append(_Going(head.id, head.number, part_list, tainted))
        else:
            referenced |= named
    groups = _groups(store)
    unreferenced = {group: groups[group] for group in groups if _is_unreferenced(group, referenced)}
    takedowns = Takedowns.load(store, heads[-1].takedowns) if heads else Takedowns()
    at_once = withdrawn | {head.part_list for head in going} | _blocked(store, unreferenced, takedowns, hopeless)
    marks = _marks(store, unreferenced, at_once)
    limit = datetime.now(UTC) - timedelta(hours=grace_hours)
    ripe = [group for group, since in marks.items() if since <= limit]
    waiting = {group: since for group, since in marks.items() if since > limit}
    if not dry_run:
        _write_marks(store, marks)  # where the reason to go at once may go first
        store.delete([snapshot_key(head.number) for head in going])  # manifests before what they name
        newer = _Newer(store, heads[-1].number if heads else 0)
        ripe = list(_delete_unnamed(store, ripe, newer))
        _write_marks(store, waiting)
    return Garbage(
        snapshots=tuple(head.id for head in going),
        withdrawn=tuple(head.id for head in going if head.tainted),
        groups=tuple(sorted(ripe)),
        objects=sum(unreferenced[group][0] for group in ripe),
        bytes=sum(unreferenced[group][1] for group in ripe),
        waiting=tuple(sorted(waiting)),
        due=_due(waiting, grace_hours),
        unfinished=store.sweep(min(grace_hours * 3600, UNFINISHED_SECONDS), dry_run),
    )


@dataclass(frozen=True)
class _Going:
    """A snapshot that goes, and whether because a takedown withdrew parts of it."""

    id: str
    number: int
    part_list: str
    tainted: bool


def _named(store: ObjectStore, number: int) -> tuple[str, set[str]]:
    """(key of the snapshot's list of parts, all groups that the snapshot refers to)."""
    part_list = part_list_ref(manifest.load(store, snapshot_key(number), KIND, VERSION)).key
    snapshot = load_snapshot(store, str(number))
    groups = {part_list, *(f"parts/{part.id}/" for part in snapshot.parts)}
    groups |= {_layer_group(layer.captions.key) for part in snapshot.parts for layer in part.captions}
    if snapshot.takedowns:
        groups.add(snapshot.takedowns.key)
    return part_list, groups


class _Newer:
    """What snapshots newer than number `newest` refer to: the same work done again takes up what has waited."""

    def __init__(self, store: ObjectStore, newest: int) -> None:
        self.store, self.newest, self.groups = store, newest, set[str]()

    def names(self, group: str) -> bool:
        """Whether one of them, as of now, refers to the group."""
        for number in snapshot_numbers(self.store):
            if number > self.newest:
                self.groups |= _named(self.store, number)[1]
                self.newest = number
        return group in self.groups


def _part_group(key: str) -> str:
    return "/".join(key.split("/")[:2]) + "/"


def _layer_group(key: str) -> str:
    """The caption layer that an object of a part belongs to; "" for other objects.

    Its captions lie under ``captions/<layer>`` and its text states under ``text/<layer>``.
    """
    names = key.split("/")
    if len(names) < 4 or names[2] not in ("captions", "text") or names[3] == "zarr.json":
        return ""
    return f"{names[0]}/{names[1]}/captions/{names[3].partition('.')[0]}"


def _groups(store: ObjectStore) -> dict[str, tuple[int, int]]:
    """(objects, bytes) of everything that snapshots can refer to: a part, a caption layer of it, a list."""
    found: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for prefix in ("parts/", "partlists/", "takedowns/"):
        for info in store.list(prefix):
            of_part = (_part_group(info.key), _layer_group(info.key))
            for group in filter(None, of_part) if prefix == "parts/" else (info.key,):
                objects, size = found[group]
                found[group] = (objects + 1, size + info.size)
    return found


def _is_unreferenced(group: str, referenced: set[str]) -> bool:
    """Layers count only in parts that stay: elsewhere they go with their part."""
    if group in referenced:
        return False
    return group.endswith("/") or not group.startswith("parts/") or _part_group(group) in referenced


def _blocked(store: ObjectStore, groups: Iterable[str], takedowns: Takedowns, hopeless: Hopeless) -> set[str]:
    """Unreferenced parts that nobody can publish any more, as they hold samples that have been taken down."""
    parts = [group.split("/")[1] for group in groups if group.startswith("parts/") and group.endswith("/")]
    if not takedowns.entries or not parts:
        return set()
    blocked, unfinished = set(), set()
    for part in parts:
        try:
            table = pq.read_table(io.BytesIO(store.read(samples_key(part))), columns=["id", "url"])
        except NotFoundError:
            unfinished.add(part)
        else:
            if takedowns.blocks(table["id"].to_pylist(), table["url"].to_pylist()).any():
                blocked.add(part)
    return {f"parts/{part}/" for part in blocked | hopeless(unfinished, takedowns)}


def _delete_unnamed(store: ObjectStore, groups: Iterable[str], newer: _Newer) -> Iterator[str]:
    for group in groups:
        if not newer.names(group):
            _delete_group(store, group)
            yield group


def _delete_group(store: ObjectStore, group: str) -> None:
    prefixes = [group]
    if group.startswith("parts/") and not group.endswith("/"):
        part, layer = group.split("/")[1::2]
        prefixes = [f"{group}.", f"{group}/", f"parts/{part}/text/{layer}/"]
    keys = [info.key for prefix in prefixes for info in store.list(prefix)]
    # What says that the others are there goes first: nobody adopts what is half gone.
    records = [key for key in keys if key.endswith(("/samples.parquet", "/layer.json"))]
    store.delete(records)
    store.delete([key for key in keys if key not in records])


def _marks(store: ObjectStore, unreferenced: Iterable[str], at_once: set[str]) -> dict[str, datetime]:
    """Since when each group waits, by what earlier runs remember; what goes at once has waited for ever."""
    now = datetime.now(UTC)
    try:
        seen: dict[str, str] = json.loads(store.read(MARKS))
    except NotFoundError:
        seen = {}
    since = {group: datetime.fromisoformat(seen[group]) if group in seen else now for group in unreferenced}
    # A re-captioning may take longer than the grace hours: as long as it comes to new parts, its layer is at work.
    newest: dict[str, datetime] = {}
    for group, moment in since.items():
        newest[_layer_name(group)] = max(moment, newest.get(_layer_name(group), moment))
    since = {group: newest[_layer_name(group)] for group in since}
    return {group: _FOR_EVER if group in at_once else moment for group, moment in since.items()}


def _layer_name(group: str) -> str:
    """The name that an added caption layer has in every part; anything else is alone with its name."""
    name = group.rpartition("/")[2]
    return name if "/captions/" in group and not name.isdigit() else group


def _write_marks(store: ObjectStore, marks: Mapping[str, datetime]) -> None:
    text = json.dumps({group: since.isoformat() for group, since in marks.items()}, indent=1)
    store.write(MARKS, text.encode())


def _due(waiting: Mapping[str, datetime], grace_hours: float) -> str | None:
    if not waiting:
        return None
    return (max(waiting.values()) + timedelta(hours=grace_hours)).isoformat(timespec="seconds")
