"""Writes parts: whole shards first, each once, then the tables and the index that make them one part."""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from starflow import latents, manifest
from starflow.config import Config
from starflow.encoders import TextIdentity, VAEIdentity
from starflow.errors import AlreadyExistsError
from starflow.manifest import ObjectRef
from starflow.objectstore import ObjectStore
from starflow.shardindex import ShardRef, held_out_candidates, shard_key, write_index
from starflow.snapshots import ArraySpec, CaptionLayer, Part, TextStates

#: The sample table of a part; rows without a line are holes.
SAMPLES = pa.schema(
    [
        ("row", pa.int64()),
        ("id", pa.string()),
        ("url", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("phash", pa.int64()),
        ("licence", pa.string()),
        ("extra", pa.string()),  # further columns of the source, as JSON
        # Where the original bytes lie in the store; null if never kept. They may be gone by now: check them by id.
        ("image_key", pa.string()),
        ("image_offset", pa.int64()),
        ("image_size", pa.int64()),
    ]
)
CAPTIONS = pa.schema([("row", pa.int64()), ("caption", pa.string())])
#: Parts end after so many full shards, which bounds what a reader loads of a part's captions at once.
PART_SHARDS = 64
#: Target size of a chunk and of a shard object, in bytes.
CHUNK_BYTES, SHARD_BYTES = 2 * 2**20, 128 * 2**20


class LayerPlan(Config):
    """A caption layer to be written; `text` names the encoder whose states are stored with it."""

    origin: str
    version: str
    weight: float = 1.0
    text: TextIdentity | None = None


class PartPlan(Config):
    """All that is fixed about a part before its first shard is written."""

    id: str
    grid: tuple[int, int]
    rows: int
    chunk: int
    shard: int
    arrays: dict[str, ArraySpec]
    layers: tuple[LayerPlan, ...] = ()
    vae: VAEIdentity

    @property
    def shards(self) -> int:
        """How many shards the part has."""
        return -(-self.rows // self.shard)

    def shard_rows(self, index: int) -> int:
        """Rows of shard `index`."""
        return min(self.shard, self.rows - index * self.shard)


def samples_key(part: str) -> str:
    """Key of a part's sample table."""
    return f"parts/{part}/samples.parquet"


def text_array(layer: int | str) -> str:
    """Name of the Zarr array with the text states of a caption layer: numbered, or added later by name."""
    return f"text/{layer}"


def plan_part(
    content: str,
    grid: tuple[int, int],
    rows: int,
    vae: VAEIdentity,
    layers: Sequence[LayerPlan] = (),
    text_shape: tuple[int, int] | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    shard_bytes: int = SHARD_BYTES,
) -> PartPlan:
    """Lays out a part of `rows` rows. `content` names what goes in: the same content gives the same id.

    `text_shape` (length, width) is the shape of the text states of the layers that store them.
    """
    shapes: dict[str, tuple[int, ...]] = {name: (vae.channels, *grid) for name in ("mean", "std")}
    shapes |= {text_array(i): text_shape for i, layer in enumerate(layers) if layer.text and text_shape}
    row_bytes = max(2 * int(np.prod(shape)) for shape in shapes.values())
    chunk, shard = latents.layout(rows, row_bytes, chunk_bytes, shard_bytes)
    plan = PartPlan(
        id="",
        grid=grid,
        rows=rows,
        chunk=chunk,
        shard=shard,
        arrays={name: ArraySpec(shape=(rows, *shape), dtype="float16") for name, shape in shapes.items()},
        layers=tuple(layers),
        vae=vae,
    )
    digest = hashlib.sha256(f"{content}\n{plan.model_dump_json()}".encode()).hexdigest()
    return plan.model_copy(update={"id": digest[:24]})


def write_shard(
    store: ObjectStore,
    plan: PartPlan,
    index: int,
    arrays: Mapping[str, NDArray[Any]],
    ids: Sequence[str | None],
) -> ShardRef:
    """Writes one shard of every array of the part; `ids` has one a row, None for a hole.

    Shards are created if absent. A second worker on the same shard, say one that was thought dead, finds the
    objects there and adopts them: they hold the same samples.
    """
    if set(arrays) != set(plan.arrays) or any(len(rows) != plan.shard_rows(index) for rows in arrays.values()):
        shapes = {name: rows.shape for name, rows in arrays.items()}
        raise ValueError(f"shard {index} of part {plan.id} needs {plan.shard_rows(index)} rows each, got {shapes}")
    objects = {}
    for name, rows in arrays.items():
        key = shard_key(plan.id, name, index, rows.ndim)
        data = latents.encode_shard(rows.astype(plan.arrays[name].dtype, copy=False), plan.chunk, plan.shard)
        objects[name] = create_object(store, key, data)
    return ShardRef(
        index=index,
        rows=len(ids),
        objects=objects,
        holes=tuple(row for row, id in enumerate(ids) if id is None),
        candidates=held_out_candidates(ids),
    )


def create_object(store: ObjectStore, key: str, data: bytes) -> ObjectRef:
    """Creates the object, or adopts what another writer of the same samples has put there."""
    try:
        store.create(key, data)
    except AlreadyExistsError:
        data = store.read(key)
    return ObjectRef(key=key, size=len(data), sha256=hashlib.sha256(data).hexdigest())


@dataclass(frozen=True)
class PartTables:
    """The written tables of a part: its samples, and the captions of each layer."""

    samples: ObjectRef
    captions: tuple[ObjectRef, ...]


def write_tables(
    store: ObjectStore, plan: PartPlan, holes: Iterable[Collection[int]], tables: Iterable[pa.Table]
) -> PartTables:
    """Writes samples and captions of a part: `holes` has the rows of each shard without a sample.

    `tables` yields one table a shard, all its rows in order, holes included: the columns of `SAMPLES` but
    `row`, and ``caption:<layer>`` for each layer. Who knows the holes beforehand writes the tables before the
    shards: then garbage collection can tell what an unfinished part holds.
    """
    with tempfile.TemporaryDirectory(prefix="starflow-part-") as folder:
        files = _write_tables(plan, holes, tables, Path(folder))
        captions = [
            manifest.upload(store, f"parts/{plan.id}/captions/{number}.parquet", file)
            for number, file in enumerate(files[1:])
        ]
        return PartTables(manifest.upload(store, samples_key(plan.id), files[0]), tuple(captions))


def finish_part(
    store: ObjectStore, plan: PartPlan, refs: Sequence[ShardRef], tables: Iterable[pa.Table] | PartTables
) -> Part:
    """Writes metadata and index of a part whose shards are all written, and the tables unless they are written."""
    latents.write_metadata(store, plan.id, plan.arrays, plan.chunk, plan.shard)
    latent_refs = [_only(ref, ("mean", "std")) for ref in refs]
    index = manifest.put(store, f"parts/{plan.id}/index.parquet", write_index(latent_refs))
    texts = [_finish_text(store, plan, number, refs) for number in range(len(plan.layers))]
    if not isinstance(tables, PartTables):
        tables = write_tables(store, plan, (ref.holes for ref in refs), tables)
    layers = [
        CaptionLayer(origin=layer.origin, version=layer.version, weight=layer.weight, captions=captions, text=text)
        for layer, captions, text in zip(plan.layers, tables.captions, texts, strict=True)
    ]
    return Part(
        id=plan.id,
        grid=plan.grid,
        rows=plan.rows,
        count=plan.rows - sum(len(ref.holes) for ref in refs),
        chunk=plan.chunk,
        shard=plan.shard,
        arrays={name: plan.arrays[name] for name in ("mean", "std")},
        vae=plan.vae,
        index=index,
        samples=tables.samples,
        captions=tuple(layers),
    )


def _finish_text(store: ObjectStore, plan: PartPlan, layer: int, refs: Sequence[ShardRef]) -> TextStates | None:
    encoder, array = plan.layers[layer].text, text_array(layer)
    if encoder is None:
        return None
    index = write_index([_only(ref, (array,)) for ref in refs])
    ref = manifest.put(store, f"parts/{plan.id}/captions/{layer}.index.parquet", index)
    return TextStates(array=array, spec=plan.arrays[array], encoder=encoder, index=ref)


def _only(ref: ShardRef, arrays: Sequence[str]) -> ShardRef:
    return ref.model_copy(update={"objects": {name: ref.objects[name] for name in arrays}})


def _write_tables(
    plan: PartPlan, holes: Iterable[Collection[int]], tables: Iterable[pa.Table], folder: Path
) -> list[Path]:
    """Parquet files, one row group a shard: the samples, then the captions of each layer."""
    files = [folder / f"{number}.parquet" for number in range(1 + len(plan.layers))]
    schemas = [SAMPLES] + [CAPTIONS] * len(plan.layers)
    writers = [pq.ParquetWriter(file, schema, compression="zstd") for file, schema in zip(files, schemas, strict=True)]
    try:
        for shard, (missing, table) in enumerate(zip(holes, tables, strict=True)):
            row = pa.array(np.arange(plan.shard_rows(shard)) + shard * plan.shard)
            valid = np.ones(len(row), bool)
            valid[list(missing)] = False
            columns = [row, *(table[name].combine_chunks() for name in SAMPLES.names[1:])]
            writers[0].write_table(pa.table(columns, names=SAMPLES.names).cast(SAMPLES).filter(pa.array(valid)))
            for layer, writer in enumerate(writers[1:]):
                caption = table[f"caption:{layer}"].combine_chunks()
                caption = pa.array(np.where(valid, caption.to_pylist(), None), pa.string())
                writer.write_table(pa.table([row, caption], schema=CAPTIONS))
    finally:
        for writer in writers:
            writer.close()
    return files


def part_from_arrays(
    store: ObjectStore,
    vae: VAEIdentity,
    mean: NDArray[Any],
    std: NDArray[Any],
    samples: pa.Table,
    captions: Sequence[tuple[LayerPlan, Sequence[str | None]]] = (),
    text: Sequence[NDArray[Any]] = (),
    chunk_bytes: int = CHUNK_BYTES,
    shard_bytes: int = SHARD_BYTES,
) -> Part:
    """Writes a part from latents made elsewhere: mean and std (N, C, h, w), scaled; `samples` has N rows.

    `samples` needs the columns id and url; the others of `SAMPLES` may be missing. A null id marks a hole.
    `text` has (N, L, E) states for each caption layer, or is empty.
    """
    table = complete(samples)
    for number, (_, texts) in enumerate(captions):
        table = table.append_column(f"caption:{number}", pa.array(texts, pa.string()))
    content = io.BytesIO()
    pq.write_table(table, content)
    digest = hashlib.sha256(content.getvalue())
    arrays = {"mean": mean, "std": std} | {text_array(i): states for i, states in enumerate(text)}
    for array in arrays.values():
        digest.update(np.ascontiguousarray(array).data)
    plan = plan_part(
        digest.hexdigest(),
        (mean.shape[2], mean.shape[3]),
        len(mean),
        vae,
        [layer for layer, _ in captions],
        (text[0].shape[1], text[0].shape[2]) if text else None,
        chunk_bytes,
        shard_bytes,
    )
    spans = [slice(k * plan.shard, k * plan.shard + plan.shard_rows(k)) for k in range(plan.shards)]
    ids = table["id"].to_pylist()
    refs = [
        write_shard(store, plan, k, {name: array[span] for name, array in arrays.items()}, ids[span])
        for k, span in enumerate(spans)
    ]
    return finish_part(store, plan, refs, (table.slice(span.start, span.stop - span.start) for span in spans))


def complete(samples: pa.Table) -> pa.Table:
    """The columns of `SAMPLES` but `row`; those that are missing are null, as in parts of earlier releases."""
    columns = [
        samples[field.name] if field.name in samples.column_names else pa.nulls(len(samples), field.type)
        for field in SAMPLES
        if field.name != "row"
    ]
    return pa.table(columns, names=SAMPLES.names[1:])


def layer_folder(part: Part, layer: LayerPlan) -> str:
    """Where the objects of a layer added to a finished part lie: by its origin, version and text encoder."""
    return f"parts/{part.id}/captions/{_layer_id(layer)}"


def _layer_id(layer: LayerPlan) -> str:
    return hashlib.sha256(layer.model_dump_json(exclude={"weight"}).encode()).hexdigest()[:16]


def add_layer(
    store: ObjectStore,
    part: Part,
    layer: LayerPlan,
    captions: Sequence[str | None],
    states: tuple[ArraySpec, Sequence[ShardRef]] | None = None,
) -> CaptionLayer:
    """Writes one more caption layer of a finished part, whose other objects stay as they are.

    `captions` has one a row; `states` are the shards of its text states, which `write_states` has written.
    """
    folder, buffer, text = layer_folder(part, layer), io.BytesIO(), None
    table = pa.table([pa.array(np.arange(part.rows)), pa.array(captions, pa.string())], schema=CAPTIONS)
    pq.write_table(table, buffer, compression="zstd", row_group_size=part.shard)
    if layer.text is not None and states is not None:
        spec, refs = states
        array = text_array(_layer_id(layer))
        latents.write_metadata(store, part.id, {array: spec}, part.chunk, part.shard)
        index = manifest.put(store, f"{folder}/index.parquet", write_index(refs))
        text = TextStates(array=array, spec=spec, encoder=layer.text, index=index)
    return CaptionLayer(
        origin=layer.origin,
        version=layer.version,
        weight=layer.weight,
        captions=manifest.put(store, f"{folder}/captions.parquet", buffer.getvalue()),
        text=text,
    )


def write_states(store: ObjectStore, part: Part, layer: LayerPlan, index: int, states: NDArray[Any]) -> ShardRef:
    """Writes shard `index` of the text states (rows, L, E) of a layer to be added; see `write_shard`."""
    array = text_array(_layer_id(layer))
    data = latents.encode_shard(states.astype(np.float16, copy=False), part.chunk, part.shard)
    ref = create_object(store, shard_key(part.id, array, index, 3), data)
    return ShardRef(index=index, rows=len(states), objects={array: ref})


def written_states(store: ObjectStore, part: Part, layer: LayerPlan, index: int) -> ShardRef | None:
    """What `write_states` has written, or None."""
    array = text_array(_layer_id(layer))
    key = shard_key(part.id, array, index, 3)
    if store.head(key) is None:
        return None
    data = store.read(key)
    ref = ObjectRef(key=key, size=len(data), sha256=hashlib.sha256(data).hexdigest())
    return ShardRef(index=index, rows=min(part.shard, part.rows - index * part.shard), objects={array: ref})
