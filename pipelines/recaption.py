"""Re-captioning: a new caption layer for every part of a published snapshot; no latent is encoded again.

The new snapshot's parts are the old ones, with one more layer, or with one replaced. Pictures are the original bytes
that the crawl stored, checked by their hash; where those are gone they are decoded from the latents, and counted.
Each chunk of captions, each shard of text states and each part's layer is committed: the same call after any kill
goes on from there, and no finished part is asked for again.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from pipelines.captioners import CaptionConfig
from pipelines.captioning import CHUNK, Pool, caption_workers, chunk_key
from pipelines.recaption_worker import RecaptionWorker, load_captions, work_prefix
from pipelines.texts import caption_quality
from starflow import manifest
from starflow.config import Config
from starflow.errors import AlreadyExistsError, ConfigError, NotFoundError
from starflow.objectstore import ObjectStore, open_store
from starflow.parts import LayerPlan, add_layer, layer_folder
from starflow.shardindex import ShardRef
from starflow.snapshots import CaptionLayer, Part, Snapshot, TextStates, load_snapshot, publish

KIND, VERSION = "caption-layer", 1

#: How often a layer is drawn, relative to the others of its sample.
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]

#: Takes the same events as that of a refresh.
OnEvent = Callable[[dict[str, Any]], None]


class RecaptionConfig(CaptionConfig):
    """Which snapshot gets which captions, and how often training draws them."""

    store: str = Field(title="Store", description="Where snapshots live: a folder or s3://BUCKET/PREFIX.", min_length=1)
    snapshot: str = Field("newest", title="Snapshot", description="The newest one, by id, number or as newest.")
    captioner: str = Field(
        "",
        title="Captioner",
        description="An OpenAI-compatible http(s) endpoint, or the Hugging Face id or path of an image-to-text model; "
        "empty: only the weights change.",
    )
    weight: Weight = Field(1.0, title="Weight", description="How often training draws the new captions.")
    other_weights: dict[str, Weight] = Field(
        {}, title="Other weights", description="New weights of the captions that are there, by origin: {alt-text: 0.2}."
    )
    replace: bool = Field(
        True, title="Replace", description="Drop captions of other versions of the same captioner; else keep both."
    )
    vae: str | None = Field(
        None, title="VAE", description="Where to find the snapshot's VAE, if not under its name; for lost pictures."
    )


class RecaptionResult(Config):
    """What a re-captioning did; `captioned` is 0 and the snapshot the one it started from when nothing was new."""

    snapshot: str
    parent: str | None
    captioner: str | None
    captioned: int = Field(description="Pictures captioned by this call.")
    reused: int = Field(description="Pictures whose new captions were there already.")
    total: int
    pictures: dict[str, int] = Field(description="How pictures captioned by this call were had: original or decoded.")
    quality: dict[str, int] = Field(
        description="Figures of the new captions, see pipelines.texts.caption_quality; refused:REASON counts pictures "
        "that the endpoint refused."
    )
    seconds: dict[str, float]


class FinishedLayer(Config):
    """A part's new layer, and figures of its captions."""

    layer: CaptionLayer
    quality: dict[str, int]


def recaption(config: RecaptionConfig, on_event: OnEvent = lambda event: None) -> RecaptionResult:
    """Publishes the snapshot with a new caption layer, other weights, or both.

    On top of whatever others publish meanwhile, where the snapshot is `newest`. Raises ConfigError for a request of
    nothing and a snapshot that is not the newest, CaptionError when the captioner fails for good, and StoreError.
    """
    if config.captioner == "alt":
        raise ConfigError("captioner=alt: a snapshot has its alt texts already; name an endpoint or a model")
    if not config.captioner and not config.other_weights:
        raise ConfigError(
            "nothing to change: name a captioner, or other_weights={ORIGIN: WEIGHT} of the captions there"
        )
    store = open_store(config.store)
    run = _Run(store, config, on_event)
    while True:
        snapshot = load_snapshot(store, config.snapshot)
        earlier = _published_before(store, config, snapshot)
        if earlier is not None:
            return run.result(earlier)
        _check_origins(config, snapshot)
        run.check_weights(snapshot)
        layers = run.layers(snapshot) if config.captioner else {}
        try:
            return run.result(run.publish(snapshot, layers))
        except AlreadyExistsError:
            if config.snapshot != "newest":
                raise  # else somebody published meanwhile: caption what is new there


def _request(config: RecaptionConfig) -> str:
    """Names what is asked for, whoever runs it."""
    same = {"store", "snapshot", "caption_concurrency", "caption_rate", "caption_budget", "vae"}
    run_on = {"actors", "cpus_per_actor", "gpus_per_actor", "ray_address"}
    return hashlib.sha256(config.model_dump_json(exclude=same | run_on).encode()).hexdigest()[:16]


def _published_before(store: ObjectStore, config: RecaptionConfig, snapshot: Snapshot) -> Snapshot | None:
    """What the same request has published on top of that `snapshot` before; None for the newest."""
    newest = load_snapshot(store)
    if config.snapshot == "newest" or snapshot.number == newest.number:
        return None  # a newer one than `snapshot` by now is found out when publishing
    child = load_snapshot(store, str(snapshot.number + 1))
    if child.versions.get("recaption") == _request(config):
        return child
    raise ConfigError(
        f"snapshot {snapshot.id} is not the newest: {newest.id} is, and a new one goes on top of it; write newest"
    )


def _check_origins(config: RecaptionConfig, snapshot: Snapshot) -> None:
    origins = {layer.origin for part in snapshot.parts for layer in part.captions}
    if unknown := sorted(set(config.other_weights) - origins):
        raise ConfigError(
            f"other_weights names {unknown}, the captions of {snapshot.id} come from {sorted(origins)}; name these"
        )


class _Run:
    """One call: its events, and what it counts."""

    def __init__(self, store: ObjectStore, config: RecaptionConfig, on_event: OnEvent) -> None:
        self.store, self.config, self.on_event = store, config, on_event
        self.captioner: LayerPlan | None = None
        self.pictures: Counter[str] = Counter()
        self.quality: Counter[str] = Counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Reports and times a stage; the caller fills in the counts to report."""
        started, counts = time.monotonic(), dict[str, Any]()
        self.on_event({"event": "stage", "stage": name, "state": "started"})
        yield counts
        seconds = self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - started, 3)
        self.on_event({"event": "stage", "stage": name, "state": "done", "seconds": seconds, "counts": counts})

    def progress(self, stage: str, done: int, total: int) -> None:
        self.on_event({"event": "progress", "stage": stage, "done": done, "total": total})

    def layers(self, snapshot: Snapshot) -> dict[str, CaptionLayer]:
        """The new layer of each part, by its id."""
        text = _stored_states(snapshot)
        arguments = (snapshot.vae, self.config.vae, text)
        with caption_workers(RecaptionWorker, self.store, self.config, *arguments) as pool:
            origin, version = pool.ask("identity")
            layer = self.captioner = LayerPlan(
                origin=origin, version=version, weight=self.config.weight, text=text.encoder if text else None
            )
            self.check_weights(snapshot)
            found = {part.id: _finished(self.store, part, layer) for part in snapshot.parts}
            open_parts = [p for p in snapshot.parts if not found[p.id] and not _layer_of(p, layer)]
            self._caption(pool, snapshot, open_parts, layer)
            states = self._states(pool, snapshot, open_parts, layer) if text else {}
        for part in open_parts:
            found[part.id] = _finish(self.store, part, layer, text, states.get(part.id))
        self.quality = sum((Counter(each.quality) for each in found.values() if each), Counter())
        return {part: each.layer for part, each in found.items() if each}

    def check_weights(self, snapshot: Snapshot) -> None:
        """Raises ConfigError where no caption would be left to draw, before anything is asked of a captioner."""
        if self.config.captioner and (self.config.weight or self.captioner is None):
            return  # the new captions will be drawn, or it is not known yet which they replace
        for part in snapshot.parts:
            layers = self._weighed(part, None).captions
            if part.captions and not any(layer.weight for layer in layers):
                had = sorted({layer.origin for layer in part.captions})
                raise ConfigError(
                    f"weight and other_weights {self.config.other_weights} would leave samples of {snapshot.id} (part "
                    f"{part.id}, captions from {', '.join(had)}) without any caption that training draws; give one of "
                    "them a weight above 0, or add captions with a captioner first"
                )

    def _caption(self, pool: Pool, snapshot: Snapshot, parts: Sequence[Part], layer: LayerPlan) -> None:
        """Has every chunk captioned that is not."""
        total, done = sum(part.count for part in parts), 0

        def jobs() -> Iterator[tuple[int, Snapshot, LayerPlan]]:
            nonlocal done
            for part in parts:
                prefix = work_prefix(part, layer)
                there = {info.key for info in self.store.list(prefix)}
                for number in range(-(-part.count // CHUNK)):
                    if chunk_key(prefix, number) in there:
                        done += _length(part, number)
                    else:
                        yield number, snapshot.model_copy(update={"parts": (part,)}), layer

        with self.stage("caption") as counts:
            for (number, of, _), pictures in pool.map("caption_samples", jobs()):
                self.pictures.update(pictures)
                done += _length(of.parts[0], number)
                self.progress("caption", done, total)
            counts |= {"captioner": f"{layer.origin} {layer.version}", "pictures": dict(self.pictures)}

    def _states(
        self, pool: Pool, snapshot: Snapshot, parts: Sequence[Part], layer: LayerPlan
    ) -> dict[str, list[ShardRef]]:
        """The written shards of the text states of each part, by its id."""
        jobs = [
            (shard, snapshot.model_copy(update={"parts": (part,)}), layer)
            for part in parts
            for shard in range(-(-part.rows // part.shard))
        ]
        refs: dict[str, list[ShardRef]] = defaultdict(list)
        with self.stage("text") as counts:
            for done, ((_, of, _), ref) in enumerate(pool.map("states", jobs), start=1):
                refs[of.parts[0].id].append(ref)
                self.progress("text", done, len(jobs))
            counts["shards"] = len(jobs)
        return {part: sorted(found, key=lambda ref: ref.index) for part, found in refs.items()}

    def publish(self, snapshot: Snapshot, layers: dict[str, CaptionLayer]) -> Snapshot:
        """Commits the snapshot with these layers and the configured weights."""
        versions = {**snapshot.versions, "recaption": _request(self.config)}
        if self.captioner is not None:
            versions["captioner"] = f"{self.captioner.origin} {self.captioner.version}"
        with self.stage("publish") as counts:
            published = publish(
                self.store,
                parent=snapshot,
                parts=[self._weighed(part, layers.get(part.id)) for part in snapshot.parts],
                image_size=snapshot.image_size,
                versions=versions,
                attribution=snapshot.attribution,
            )
            counts |= {"snapshot": published.id, "parent": published.parent}
        return published

    def _weighed(self, part: Part, new: CaptionLayer | None) -> Part:
        """The part with its new layer, without those that it replaces, and with the configured weights."""
        layers, plan = [], self.captioner
        for layer in part.captions:
            same = plan is not None and (layer.origin, layer.version) == (plan.origin, plan.version)
            if plan is not None and layer.origin == plan.origin and not same and self.config.replace:
                continue
            weight = self.config.weight if same else self.config.other_weights.get(layer.origin, layer.weight)
            layers.append(layer.model_copy(update={"weight": weight}))
        if new is not None and plan is not None and _layer_of(part, plan) is None:
            layers.append(new.model_copy(update={"weight": self.config.weight}))
        return part.model_copy(update={"captions": tuple(layers)})

    def result(self, snapshot: Snapshot) -> RecaptionResult:
        """What has been done, once `snapshot` is there."""
        captioned = sum(self.pictures.values())
        return RecaptionResult(
            snapshot=snapshot.id,
            parent=snapshot.parent,
            captioner=f"{self.captioner.origin} {self.captioner.version}" if self.captioner else None,
            captioned=captioned,
            reused=snapshot.counts.total - captioned if self.config.captioner else 0,
            total=snapshot.counts.total,
            pictures=dict(self.pictures),
            quality=dict(self.quality),
            seconds=self.seconds,
        )


def _length(part: Part, chunk: int) -> int:
    return min(CHUNK, part.count - chunk * CHUNK)


def _stored_states(snapshot: Snapshot) -> TextStates | None:
    """What the snapshot's stored text states are like, where it stores any."""
    return next((layer.text for part in snapshot.parts for layer in part.captions if layer.text), None)


def _layer_of(part: Part, plan: LayerPlan) -> CaptionLayer | None:
    """The part's layer of that origin and version, if it has one."""
    return next((c for c in part.captions if (c.origin, c.version) == (plan.origin, plan.version)), None)


def _finished(store: ObjectStore, part: Part, layer: LayerPlan) -> FinishedLayer | None:
    try:
        body = manifest.load(store, _record_key(part, layer), KIND, VERSION)
    except NotFoundError:
        return None
    _delete_chunks(store, part, layer)  # of who was killed before doing so
    return FinishedLayer.model_validate(body)


def _record_key(part: Part, layer: LayerPlan) -> str:
    return f"{layer_folder(part, layer)}/layer.json"


def _finish(
    store: ObjectStore, part: Part, layer: LayerPlan, text: TextStates | None, refs: list[ShardRef] | None
) -> FinishedLayer:
    """Writes a part's layer from its chunks, which are then deleted."""
    samples = pq.read_table(pa.BufferReader(manifest.get(store, part.samples)), columns=["row"])
    texts, refused = load_captions(store, part, layer, 0, part.count)
    captions: list[str | None] = [None] * part.rows
    for row, caption in zip(samples["row"].to_pylist(), texts, strict=True):
        captions[row] = caption or None
    states = None
    if text is not None and refs is not None:
        states = (text.spec.model_copy(update={"shape": (part.rows, *text.spec.shape[1:])}), refs)
    quality = caption_quality(texts) | refused
    finished = FinishedLayer(layer=add_layer(store, part, layer, captions, states), quality=quality)
    manifest.commit(store, _record_key(part, layer), KIND, VERSION, finished.model_dump(mode="json"))
    _delete_chunks(store, part, layer)
    return finished


def _delete_chunks(store: ObjectStore, part: Part, layer: LayerPlan) -> None:
    store.delete([info.key for info in store.list(work_prefix(part, layer))])
