"""Snapshots: immutable manifests of encoded image-caption data. A refresh reads one and commits the next.

History is a line. The manifest of snapshot number n is ``snapshots/<n, eight digits>.json``, created if
absent: of two publishers that start from the same parent exactly one gets the number, and the other is told
to run again on top of it. Readers list the manifests; the highest number is the newest snapshot, and no
mutable pointer decides anything. The list of parts, which grows for years, is an object of its own, so that
listing snapshots stays cheap.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

from pydantic import Field, TypeAdapter, ValidationError

from starflow import manifest
from starflow.config import Config
from starflow.encoders import TextIdentity, VAEIdentity
from starflow.errors import AlreadyExistsError, NotFoundError, StoreError
from starflow.manifest import ObjectRef
from starflow.objectstore import ObjectStore
from starflow.shardindex import read_index

KIND, VERSION = "snapshot", 1
PREFIX = "snapshots/"
#: Parts looked at in parallel.
_THREADS = 8


class ArraySpec(Config):
    """One Zarr array of a part."""

    shape: tuple[int, ...] = Field(description="First axis: the rows of the part.")
    dtype: str


class TextStates(Config):
    """Text-encoder states of one caption layer: an array (rows, length, width), zero at padded positions."""

    array: str = Field(description="Name of the Zarr array inside the part, such as text/0.")
    spec: ArraySpec
    encoder: TextIdentity
    index: ObjectRef = Field(description="Parquet: one line a shard of this array.")


class CaptionLayer(Config):
    """One caption for each row (null where this origin has none); layers are only ever added."""

    origin: str = Field(description="Where the captions come from: alt-text, or a captioner's name.")
    version: str
    weight: float = Field(ge=0, description="How often training draws this layer, relative to the others.")
    captions: ObjectRef = Field(description="Parquet (row int64, caption string), every row in order.")
    text: TextStates | None = None


class Part(Config):
    """Zarr group ``parts/<id>/`` with samples of one latent grid; written once.

    Rows that hold no sample (inputs that turned out to be corrupt) are holes: absent from `samples`.
    """

    id: str
    grid: tuple[int, int] = Field(description="Latent height and width.")
    rows: int = Field(description="Length of the arrays, holes included.")
    count: int = Field(description="Valid samples.")
    chunk: int = Field(description="Rows of a chunk.")
    shard: int = Field(description="Rows of a shard; the last one may hold fewer.")
    arrays: dict[str, ArraySpec] = Field(description="mean and std of the VAE posterior, (rows, C, h, w).")
    vae: VAEIdentity
    index: ObjectRef = Field(description="Parquet: one line a shard (see starflow.shardindex).")
    samples: ObjectRef = Field(description="Parquet: row, id, url, width, height, phash, licence, extra.")
    captions: tuple[CaptionLayer, ...] = ()


class Counts(Config):
    """Samples added since the parent, kept from it, and in all."""

    added: int
    kept: int
    total: int


class Summary(Config):
    """All of a snapshot but its parts: what a list of snapshots shows."""

    id: str = Field(description="<number>-<hash of the content>: the same inputs give the same id.")
    number: int = Field(description="Position in the history, from 1.")
    parent: str | None
    created: str = Field(description="ISO 8601, UTC; not part of the id.")
    image_size: int = Field(description="Pictures have about image_size^2 pixels, whatever their shape.")
    vae: VAEIdentity
    counts: Counts
    dropped: dict[str, int] = Field(description="Samples this refresh rejected, by reason.")
    removed: dict[str, int] = Field(default={}, description="Samples of the parent that left here, by reason.")
    sources: dict[str, int] = Field(description="Source: candidates it gave to this refresh.")
    versions: dict[str, str] = Field(description="What made it, such as captioner and filters.")
    attribution: str | None = Field(description="To be shown with the pictures and what was trained on them.")
    withdrawn: tuple[str, ...] = Field(
        default=(), description="Parts that a takedown here replaced, and that older snapshots hold."
    )
    takedowns: ObjectRef | None = Field(
        default=None, description="Parquet (kind, value): everything ever taken down; never to come back."
    )


class Snapshot(Summary):
    """An immutable data set: read it with `starflow.reader.SnapshotReader`."""

    parts: tuple[Part, ...]


_PARTS = TypeAdapter(tuple[Part, ...])


def publish(
    store: ObjectStore,
    *,
    parent: Snapshot | None,
    parts: Sequence[Part],
    image_size: int,
    dropped: Mapping[str, int] | None = None,
    added: int | None = None,
    removed: Mapping[str, int] | None = None,
    sources: Mapping[str, int] | None = None,
    versions: Mapping[str, str] | None = None,
    attribution: str | None = None,
    withdrawn: Sequence[str] = (),
    takedowns: ObjectRef | None = None,
) -> Snapshot:
    """Commits the snapshot after `parent` (None: the first one) and returns it.

    `parts` are all parts, the parent's included. Publishing what the parent already holds returns the parent;
    publishing the same content again returns what was published first. `takedowns` is inherited. `added` is how many
    samples the parent does not hold (None: those of all parts that it does not hold, none of which it has rewritten).

    Raises StoreError for parts without samples, of different VAEs, of another image size than the parent's, or whose
    objects are gone, and AlreadyExistsError when somebody else has published on top of `parent` meanwhile.
    """
    _check_parts(parent, parts, image_size, bool(withdrawn))
    takedowns = takedowns or (parent.takedowns if parent else None)
    if parent is not None and list(parts) == list(parent.parts) and takedowns == parent.takedowns and not withdrawn:
        return parent
    counts = _counts(parent, parts, added)
    listed = _PARTS.dump_json(tuple(parts), indent=1)
    try:
        _PARTS.validate_json(listed)  # what no reader takes would close the store to everybody
    except ValidationError as error:
        raise StoreError(f"these parts could not be read back, so nothing is published: {error}") from error
    _check_present(store, parent, parts)
    part_list = manifest.put(store, f"partlists/{hashlib.sha256(listed).hexdigest()[:32]}.json", listed)
    body: dict[str, Any] = {
        "number": parent.number + 1 if parent else 1,
        "parent": parent.id if parent else None,
        "image_size": image_size,
        "vae": (parent.vae if parent else parts[0].vae).model_dump(),
        "counts": counts.model_dump(),
        "dropped": dict(dropped or {}),
        "removed": dict(removed or {}),
        "sources": dict(sources or {}),
        "versions": dict(versions or {}),
        "attribution": attribution,
        "withdrawn": list(withdrawn),
        "takedowns": takedowns.model_dump() if takedowns else None,
        "part_list": part_list.model_dump(),
    }
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    body["id"] = f"{body['number']:08d}-{digest[:16]}"
    body["created"] = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        manifest.commit(store, snapshot_key(body["number"]), KIND, VERSION, body)
    except AlreadyExistsError as error:
        winner = manifest.load(store, snapshot_key(body["number"]), KIND, VERSION)
        if winner["id"] != body["id"]:
            raise AlreadyExistsError(
                f"snapshot {winner['id']} was published on top of {body['parent'] or 'nothing'} meanwhile; "
                "run the same command again to go on from there"
            ) from error
        body = winner
    return _snapshot(body, tuple(parts))


def _check_parts(parent: Snapshot | None, parts: Sequence[Part], image_size: int, takedown: bool) -> None:
    if not sum(part.count for part in parts) and not takedown:
        raise StoreError("a snapshot without any sample cannot be published; see why the samples were dropped")
    if parent is not None and image_size != parent.image_size:
        raise StoreError(
            f"the new parts hold {image_size} px latents, snapshot {parent.id} holds {parent.image_size} px latents; "
            f"use image_size={parent.image_size}, or another store"
        )
    expected = parent.vae if parent else parts[0].vae
    for part in parts:
        if part.vae != expected:
            raise StoreError(
                f"part {part.id} was encoded by the VAE {part.vae.name} ({part.vae.sha256[:12]}), the snapshot "
                f"holds latents of {expected.name} ({expected.sha256[:12]}); use another store for another VAE"
            )


def _check_present(store: ObjectStore, parent: Snapshot | None, parts: Sequence[Part]) -> None:
    """What was written long before it is published, say before a gate opened, may have been collected as garbage."""
    old = {key for part in parent.parts for key in _tables(part)} if parent else set()
    new = [part for part in parts if not old.issuperset(_tables(part))]  # another weight is nothing new
    with ThreadPoolExecutor(_THREADS) as pool:
        gone = [key for keys in pool.map(lambda part: _missing(store, part), new) for key in keys]
    if gone:
        raise StoreError(
            f"{len(gone)} objects of what was to be published are gone from {store.url}, such as {gone[0]}: garbage "
            "collection takes what nobody has published for long; run the same command again, which makes them anew"
        )


def _tables(part: Part) -> list[str]:
    """The tables of a part and of its caption layers: all other objects stand or fall with them."""
    texts = [layer.text.index.key for layer in part.captions if layer.text]
    return [part.index.key, part.samples.key, *(layer.captions.key for layer in part.captions), *texts]


def _missing(store: ObjectStore, part: Part) -> list[str]:
    present = {info.key for info in store.list(f"parts/{part.id}/")}
    # Shards are named by the tables, so these are looked at first.
    gone = [key for key in _tables(part) if key not in present]
    return gone or [ref.key for ref in part_objects(store, part) if ref.key not in present]


def part_objects(store: ObjectStore, part: Part) -> list[ObjectRef]:
    """Every object with a checksum that a part consists of. Raises NotFoundError or CorruptError for its index."""
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


def _counts(parent: Snapshot | None, parts: Sequence[Part], added: int | None) -> Counts:
    total = sum(part.count for part in parts)
    if added is None:
        old = {part.id for part in parent.parts} if parent else set()
        added = sum(part.count for part in parts if part.id not in old)
    return Counts(added=added, kept=total - added, total=total)


def list_snapshots(store: ObjectStore) -> list[Summary]:
    """Every published snapshot, oldest first."""
    summaries = []
    for number in snapshot_numbers(store):
        body = manifest.load(store, snapshot_key(number), KIND, VERSION)
        del body["part_list"]
        summaries.append(Summary.model_validate(body))
    return summaries


def load_snapshot(store: ObjectStore, name: str = "newest") -> Snapshot:
    """Loads a snapshot by id, by number, or ``newest``.

    Raises NotFoundError naming what the store does hold.
    """
    numbers = snapshot_numbers(store)
    number = name.partition("-")[0]
    if name == "newest" and numbers:
        wanted = numbers[-1]
    elif number.isdigit() and int(number) in numbers:
        wanted = int(number)
    else:
        raise _not_found(store, name, numbers)
    body = manifest.load(store, snapshot_key(wanted), KIND, VERSION)
    if "-" in name and body["id"] != name:
        raise _not_found(store, name, numbers)
    return _snapshot(body, _PARTS.validate_json(manifest.get(store, part_list_ref(body))))


def newest_snapshot(store: ObjectStore) -> Snapshot | None:
    """The newest snapshot, or None in a store without any."""
    return load_snapshot(store) if snapshot_numbers(store) else None


def snapshot_key(number: int) -> str:
    """Key of the manifest of snapshot `number`."""
    return f"{PREFIX}{number:08d}.json"


def snapshot_numbers(store: ObjectStore) -> list[int]:
    """Numbers of the published snapshots, ascending."""
    names = [info.key.removeprefix(PREFIX).removesuffix(".json") for info in store.list(PREFIX)]
    return [int(name) for name in names if name.isdigit()]


def part_list_ref(body: Mapping[str, Any]) -> ObjectRef:
    """Where a manifest's list of parts lies."""
    return ObjectRef.model_validate(body["part_list"])


def _snapshot(body: dict[str, Any], parts: tuple[Part, ...]) -> Snapshot:
    fields = {key: value for key, value in body.items() if key != "part_list"}
    return Snapshot.model_validate({**fields, "parts": parts})


def _not_found(store: ObjectStore, name: str, numbers: Sequence[int]) -> NotFoundError:
    if not numbers:
        return NotFoundError(f"{store.url} holds no snapshot yet; publish one with starflow refresh")
    known = f"1 snapshot, number {numbers[0]}" if len(numbers) == 1 else f"snapshots {numbers[0]} to {numbers[-1]}"
    return NotFoundError(f"snapshot {name!r} is not in {store.url}, which holds {known}; or write newest")
