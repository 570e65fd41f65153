"""The encode plan: which samples go into which shard, fixed and stored before any of them is encoded.

Samples go to the aspect-ratio bucket nearest to their own shape; each bucket makes parts of its own. A part's
members are a Parquet file with one row group a shard, so a worker needs nothing but (part, shard number).
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from pipelines.aspect import ASPECT_RATIOS, AspectRatio, parse_aspect_ratio
from starflow import manifest
from starflow.config import Config
from starflow.encoders import TextIdentity, VAEIdentity
from starflow.errors import NotFoundError, StoreError
from starflow.manifest import ObjectRef
from starflow.objectstore import ObjectStore
from starflow.parts import CHUNK_BYTES, PART_SHARDS, SAMPLES, SHARD_BYTES, LayerPlan, PartPlan, plan_part
from starflow.takedowns import Takedowns

KIND, VERSION = "encode-plan", 1

_IMAGE = ("image_key", "image_offset", "image_size")
_CAPTIONS = pa.list_(
    pa.struct([("text", pa.string()), ("origin", pa.string()), ("version", pa.string()), ("weight", pa.float32())])
)
#: What the content of a part is known by: all that is not a function of it.
_CONTENT = ["id", "url", "licence", "extra", "captions", *_IMAGE]
_SPOOL = pa.schema([*(field for field in SAMPLES if field.name != "row"), ("captions", _CAPTIONS)])


class EncodeConfig(Config):
    """How samples become latents, and on what."""

    image_size: int = Field(256, ge=8, description="Pictures of about image_size^2 pixels, whatever their shape.")
    aspect_ratios: tuple[AspectRatio, ...] = Field(
        ASPECT_RATIOS, min_length=1, description="Shapes, width:height; each picture takes the nearest one."
    )
    patch: int = Field(1, ge=1, description="Latent sides are multiples of it: the patch size of the flow.")
    vae: str = Field("emoji", description="emoji (embedded), or a Hugging Face id or path.")
    text_encoder: str | None = Field(
        None, description="Small text encoder whose states are stored, such as minilm; null: captions only."
    )
    text_length: int = Field(16, ge=1, description="Tokens of the stored text states.")
    actors: int = Field(2, ge=1, description="Ray actors; each holds one VAE.")
    cpus_per_actor: int = Field(1, ge=1, description="CPU cores that Ray reserves for each actor.")
    gpus_per_actor: float = Field(0, ge=0, description="Share of a GPU that Ray reserves for each actor.")
    address: str | None = Field(None, description="Ray cluster: null starts one here, auto finds the running one.")
    vae_batch: int = Field(0, ge=0, description="Pictures the VAE encodes at once; 0: 16 on CPU, what fits on GPU.")
    chunk_bytes: int = Field(CHUNK_BYTES, ge=1, description="Size of a chunk of an array.")
    shard_bytes: int = Field(SHARD_BYTES, ge=1, description="Size of a shard object of an array.")


class Models(Config):
    """What the encoders say of themselves."""

    vae: VAEIdentity
    text: TextIdentity | None
    text_shape: tuple[int, int] | None = Field(description="(length, width) of text states.")


class PlannedPart(Config):
    """A part and where its members are listed."""

    plan: PartPlan
    members: ObjectRef


class EncodePlan(Config):
    """Everything there is to do, in order."""

    request: str = Field(description="Hash of tables and settings: a plan serves no others.")
    image_size: int
    parts: tuple[PlannedPart, ...]
    dropped: dict[str, int]


def buckets(image_size: int, aspect_ratios: Sequence[str], unit: int) -> list[tuple[int, int]]:
    """Picture sizes (height, width) of about image_size^2 pixels, sides in multiples of `unit`.

    Raises ValueError for an aspect ratio that is not WIDTH:HEIGHT.
    """
    sizes = []
    for text in aspect_ratios:
        ratio = parse_aspect_ratio(text)
        sides = (image_size / math.sqrt(ratio), image_size * math.sqrt(ratio))
        sizes.append((max(round(sides[0] / unit), 1) * unit, max(round(sides[1] / unit), 1) * unit))
    return list(dict.fromkeys(sizes))


def nearest_bucket(widths: np.ndarray, heights: np.ndarray, sizes: Sequence[tuple[int, int]]) -> np.ndarray:
    """Index of the bucket whose shape is nearest (in the logarithm of width / height) to each picture's."""
    shapes = np.log([width / height for height, width in sizes])
    return np.abs(np.log(widths / heights)[:, None] - shapes).argmin(axis=1)


def request_hash(tables: Sequence[str], config: EncodeConfig) -> str:
    """Hash of what a plan is for; how many actors work on it, and where, is not part of it."""
    settings = config.model_dump(exclude={"actors", "cpus_per_actor", "gpus_per_actor", "address", "vae_batch"})
    return hashlib.sha256(json.dumps([list(tables), settings], sort_keys=True).encode()).hexdigest()


def load_plan(store: ObjectStore, work: str, tables: Sequence[str], config: EncodeConfig) -> EncodePlan | None:
    """The plan stored under `work`, or None. Raises StoreError when it is for other tables or settings."""
    try:
        plan = EncodePlan.model_validate(manifest.load(store, f"{work}/plan.json", KIND, VERSION))
    except NotFoundError:
        return None
    if plan.request != request_hash(tables, config):
        raise StoreError(
            f"{store.url}/{work} holds the encode plan of other tables or settings; finish that one, or use another "
            "work prefix"
        )
    return plan


def make_plan(
    store: ObjectStore,
    work: str,
    tables: Sequence[str],
    config: EncodeConfig,
    models: Models,
    takedowns: Takedowns,
) -> EncodePlan:
    """Reads the sample tables one after the other, stores the plan under `work` and returns it."""
    sizes = buckets(config.image_size, config.aspect_ratios, models.vae.downsampling * config.patch)
    dropped: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="starflow-plan-") as folder:
        spools = [_Spool(Path(folder), size, config, models) for size in sizes]
        for key in tables:
            table = _read_table(store, key)
            blocked = takedowns.blocks(table["id"].to_pylist(), table["url"].to_pylist())
            if blocked.any():
                dropped["taken down"] = dropped.get("taken down", 0) + int(blocked.sum())
                table = table.filter(pa.array(~blocked))
            chosen = nearest_bucket(table["width"].to_numpy(), table["height"].to_numpy(), sizes)
            for index, spool in enumerate(spools):
                spool.add(table.filter(pa.array(chosen == index)))
        parts = [part for spool in spools for part in spool.finish(store, work)]
    plan = EncodePlan(
        request=request_hash(tables, config), image_size=config.image_size, parts=tuple(parts), dropped=dropped
    )
    manifest.commit(store, f"{work}/plan.json", KIND, VERSION, plan.model_dump(mode="json"))
    return plan


def _read_table(store: ObjectStore, key: str) -> pa.Table:
    """A sample table in the columns of `_SPOOL`; those that it lacks are null."""
    try:
        table = pq.read_table(pa.BufferReader(store.read(key)))
        for number, name in enumerate(_IMAGE):
            field = pa.compute.struct_field(table["image"], ["key", "offset", "size"][number])
            table = table.append_column(name, field)
        missing = [field for field in _SPOOL if field.name not in table.column_names and field.nullable]
        for field in missing:
            table = table.append_column(field, pa.nulls(len(table), field.type))
        return table.select(_SPOOL.names).cast(_SPOOL)
    except (pa.ArrowException, KeyError) as error:
        raise StoreError(f"{store.url}/{key} is not a sample table ({error}); crawl it again") from error


class _Spool:
    """Collects the samples of one bucket in local files, one a part, then writes them out shard by shard."""

    def __init__(self, folder: Path, size: tuple[int, int], config: EncodeConfig, models: Models) -> None:
        self.folder, self.config, self.models = folder, config, models
        down = models.vae.downsampling
        self.grid = (size[0] // down, size[1] // down)
        full = plan_part("", self.grid, 2**31, models.vae, [LayerPlan(origin="", version="", text=models.text)],
                         models.text_shape, config.chunk_bytes, config.shard_bytes)  # fmt: skip
        self.capacity = full.shard * PART_SHARDS
        self.files: list[Path] = []
        self.writer: pq.ParquetWriter | None = None
        self.room = 0

    def add(self, table: pa.Table) -> None:
        while len(table):
            if not self.room:
                self._close()
                self.files.append(self.folder / f"{self.grid[0]}x{self.grid[1]}-{len(self.files)}.parquet")
                self.writer, self.room = pq.ParquetWriter(self.files[-1], _SPOOL), self.capacity
            assert self.writer is not None
            head, table = table.slice(0, self.room), table.slice(self.room)
            self.writer.write_table(head)
            self.room -= len(head)

    def finish(self, store: ObjectStore, work: str) -> Iterator[PlannedPart]:
        self._close()
        for file in self.files:
            yield self._plan(store, work, file)

    def _close(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def _plan(self, store: ObjectStore, work: str, file: Path) -> PlannedPart:
        layers: dict[tuple[Any, ...], int] = {}
        content, rows = hashlib.sha256(), 0
        for batch in pq.ParquetFile(file).iter_batches():
            for sample in batch.select(_CONTENT).to_pylist():
                content.update(json.dumps(sample, sort_keys=True).encode())
                for key, _ in _keyed(sample["captions"]):
                    layers.setdefault(key, len(layers))
            rows += len(batch)
        plans = [LayerPlan(origin=o, version=v, weight=w, text=self.models.text) for o, v, w, _ in layers]
        plan = plan_part(content.hexdigest(), self.grid, rows, self.models.vae, plans, self.models.text_shape,
                         self.config.chunk_bytes, self.config.shard_bytes)  # fmt: skip
        members = file.with_suffix(".members")
        _write_members(file, members, plan.shard, layers)
        return PlannedPart(plan=plan, members=manifest.upload(store, f"{work}/members/{plan.id}.parquet", members))


def _keyed(captions: list[dict[str, Any]] | None) -> Iterator[tuple[tuple[Any, ...], str]]:
    """Captions with the layer each belongs to: the nth of one origin, version and weight."""
    seen: dict[tuple[Any, ...], int] = {}
    for caption in captions or ():
        kind = (caption["origin"], caption["version"], round(caption["weight"], 6))
        number = seen[kind] = seen.get(kind, -1) + 1
        if caption["text"]:
            yield (*kind, number), caption["text"]


def _write_members(source: Path, target: Path, shard: int, layers: dict[tuple[Any, ...], int]) -> None:
    """Rewrites spooled samples with one row group a shard and one column a caption layer."""
    captions = [(f"caption:{number}", pa.string()) for number in range(len(layers))]
    schema = pa.schema([*(field for field in _SPOOL if field.name != "captions"), *captions])
    with pq.ParquetWriter(target, schema, compression="zstd") as writer:
        waiting: list[pa.RecordBatch] = []
        for batch in pq.ParquetFile(source).iter_batches(batch_size=shard):
            waiting.append(batch)
            table = pa.Table.from_batches(waiting)
            for start in range(0, len(table) // shard * shard, shard):
                writer.write_table(_with_layers(table.slice(start, shard), layers, schema), row_group_size=shard)
            waiting = table.slice(len(table) // shard * shard).to_batches()
        if waiting:
            rest = pa.Table.from_batches(waiting)
            writer.write_table(_with_layers(rest, layers, schema), row_group_size=shard)


def _with_layers(table: pa.Table, layers: dict[tuple[Any, ...], int], schema: pa.Schema) -> pa.Table:
    columns: list[list[str | None]] = [[None] * len(table) for _ in layers]
    for row, captions in enumerate(table["captions"].to_pylist()):
        for key, text in _keyed(captions):
            columns[layers[key]][row] = text
    table = table.drop_columns(["captions"])
    for number, column in enumerate(columns):
        table = table.append_column(f"caption:{number}", pa.array(column, pa.string()))
    return table.cast(schema)
