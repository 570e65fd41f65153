"""Captions many pictures in chunks that are committed one by one: a kill costs at most the chunks in hand.

A captioner that fails costs nothing: what it has answered of a chunk is kept, and only the rest is asked for next time.

A captioner behind an endpoint is asked from here. A Hugging Face model runs on Ray actors, each of which fetches,
decodes and captions a chunk a call; a chunk whose actor died is given to another.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any, Protocol

from PIL import Image
from pydantic import Field

from pipelines.actors import JOBS_IN_HAND, Job, Resources, actor_pool
from pipelines.captioners import CaptionConfig, Captioner, CaptionError, RefusedError, load_captioner
from pipelines.originals import Picture, fetch, spans
from starflow import manifest
from starflow.config import Config
from starflow.errors import AlreadyExistsError, NotFoundError
from starflow.images import ImageError, decode_image
from starflow.objectstore import ObjectStore, open_store

KIND, VERSION = "captions", 1
#: Pictures of a chunk.
CHUNK = 64


class Chunk(Config):
    """A chunk's captions by row (None: there is no picture, or no answer yet), how its pictures were had, and how many
    the captioner has refused, by reason."""

    captions: tuple[str | None, ...]
    pictures: dict[str, int]
    refused: dict[str, int] = Field(default={})


class Pool(Protocol):
    """Workers, here or on Ray."""

    def ask(self, method: str) -> Any:
        """Calls a method without arguments, which loads models."""

    def map(self, method: str, jobs: Iterable[Job]) -> Iterator[tuple[Job, Any]]:
        """Calls a method for each job; yields jobs with their answers as they are finished."""


class CaptionWorker:
    """Holds a captioner and captions one chunk a call; calls from two threads overlap fetching and captioning."""

    def __init__(self, store: str, config: CaptionConfig) -> None:
        self.store, self.config = open_store(store), config

    @cached_property
    def captioner(self) -> Captioner:
        """The configured captioner, loaded on first use, on as many threads as Ray reserves CPUs."""
        if not self.config.is_endpoint:
            import torch

            torch.set_num_threads(self.config.cpus_per_actor)
        return load_captioner(self.config)

    def identity(self) -> tuple[str, str]:
        """(name, version) of the captioner."""
        return self.captioner.name, self.captioner.version

    def caption(self, record: str, pictures: Sequence[Picture], alts: Sequence[str]) -> dict[str, int]:
        """Commits the captions of `pictures` (rows index `alts`); one that cannot be decoded has an empty one."""
        return self.commit(record, originals(self.store, pictures), alts)

    def commit(
        self, record: str, images: dict[int, Image.Image], alts: Sequence[str], decoded: Collection[int] = ()
    ) -> dict[str, int]:
        """Commits, under the key `record`, a caption for each of `alts`, of the images by row; returns how many were
        asked for.

        The rows `decoded` come from latents. A picture that the captioner refuses has an empty caption. When the
        captioner fails, what it has answered is kept beside `record` before its error is raised.
        """
        begun = self._begun(record, len(alts))
        captions, refused = list(begun.captions), Counter(begun.refused)
        rows = [row for row in images if captions[row] is None]
        answers = self.captioner.caption([images[row] for row in rows], [alts[row] for row in rows])
        failure: CaptionError | None = None
        for row, answer in zip(rows, answers, strict=True):
            if isinstance(answer, str):
                captions[row] = " ".join(answer.split())
            elif isinstance(answer, RefusedError):
                captions[row] = ""
                refused[f"refused:{answer.reason}"] += 1
            else:
                failure = answer
        latents = len(set(rows) & set(decoded))
        counts = {"original": len(rows) - latents, "decoded": latents}
        body = Chunk(captions=tuple(captions), pictures=counts, refused=refused).model_dump(mode="json")
        if failure is not None:
            self.store.write(_begun_key(record), manifest.encode(KIND, VERSION, body))
            raise failure
        try:
            manifest.commit(self.store, record, KIND, VERSION, body)
        except AlreadyExistsError:  # another worker, thought dead, was first: its captions hold
            return load_chunk(self.store, record).pictures
        return counts

    def _begun(self, record: str, count: int) -> Chunk:
        """What an earlier call has left of the chunk, when its captioner failed."""
        try:
            return load_chunk(self.store, _begun_key(record))
        except NotFoundError:
            return Chunk(captions=(None,) * count, pictures={})


def originals(
    store: ObjectStore, pictures: Sequence[Picture], ids: Sequence[str] | None = None
) -> dict[int, Image.Image]:
    """The pictures by row, decoded; without those whose bytes are gone, are no picture, or are not those of `ids`.

    `ids` (SHA-256 by row) are checked where they are given.
    """
    found: dict[int, Image.Image] = {}
    for span in spans(pictures):
        try:
            contents = list(fetch(store, span))
        except NotFoundError:
            continue
        for picture, data in contents:
            if ids is None or hashlib.sha256(data).hexdigest() == ids[picture.row]:
                with suppress(ImageError):
                    found[picture.row] = decode_image(data)
    return dict(sorted(found.items()))


def load_chunk(store: ObjectStore, record: str) -> Chunk:
    """A committed chunk."""
    return Chunk.model_validate(manifest.load(store, record, KIND, VERSION))


def load_chunks(store: ObjectStore, prefix: str, numbers: Iterable[int]) -> tuple[list[str], dict[str, int]]:
    """The captions of these committed chunks one after the other, and how many were refused, by reason."""
    captions: list[str] = []
    refused: Counter[str] = Counter()
    for number in numbers:
        chunk = load_chunk(store, chunk_key(prefix, number))
        captions += [text or "" for text in chunk.captions]
        refused.update(chunk.refused)
    return captions, dict(refused)


def chunk_key(prefix: str, number: int) -> str:
    """Key of the record of chunk `number`."""
    return f"{prefix}{number:06d}.json"


def _begun_key(record: str) -> str:
    return f"{record.removesuffix('.json')}.begun.json"


class Captioning:
    """A captioner at work on pictures in a store."""

    def __init__(self, store: ObjectStore, pool: Pool) -> None:
        self.store, self.pool = store, pool
        self.name, self.version = pool.ask("identity")

    def captions(
        self, prefix: str, pictures: Sequence[Picture], alts: Sequence[str]
    ) -> tuple[list[str], dict[str, int]]:
        """(one caption for each of `alts`, how many pictures were refused, by reason); `pictures` are theirs by row.

        Chunks are kept under the key `prefix`.
        """
        done = {info.key for info in self.store.list(prefix)}
        chunks = -(-len(alts) // CHUNK)
        by_chunk: list[list[Picture]] = [[] for _ in range(chunks)]
        for picture in pictures:
            by_chunk[picture.row // CHUNK].append(picture._replace(row=picture.row % CHUNK))
        jobs = (
            (chunk_key(prefix, number), by_chunk[number], alts[number * CHUNK : (number + 1) * CHUNK])
            for number in range(chunks)
            if chunk_key(prefix, number) not in done
        )
        for _ in self.pool.map("caption", jobs):
            pass
        return load_chunks(self.store, prefix, range(chunks))


@contextmanager
def caption_workers(worker: type, store: ObjectStore, config: CaptionConfig, *arguments: Any) -> Iterator[Pool]:
    """Workers ``worker(store, config, *arguments)``: one here for an endpoint, actors on Ray for a model."""
    if config.is_endpoint:
        yield LocalPool(worker(store.url, config, *arguments))
        return
    resources = Resources(config.actors, config.cpus_per_actor, config.gpus_per_actor, config.ray_address)
    with actor_pool(worker, resources, store.url, config, *arguments) as pool:
        yield pool


@contextmanager
def captioning(store: ObjectStore, config: CaptionConfig) -> Iterator[Captioning]:
    """The configured captioner, ready. Raises CaptionError, or ActorError when Ray cannot start it."""
    with caption_workers(CaptionWorker, store, config) as pool:
        yield Captioning(store, pool)


class LocalPool:
    """One worker in this process, called from a few threads."""

    def __init__(self, worker: Any) -> None:
        self.worker = worker

    def ask(self, method: str) -> Any:
        """Calls `method`."""
        return getattr(self.worker, method)()

    def map(self, method: str, jobs: Iterable[Job]) -> Iterator[tuple[Job, Any]]:
        """Calls `method` with each job's arguments, a few ahead of what has been taken."""
        waiting: deque[tuple[Job, Future[Any]]] = deque()
        with ThreadPoolExecutor(JOBS_IN_HAND, thread_name_prefix="captioning") as threads:
            for job in jobs:
                waiting.append((job, threads.submit(getattr(self.worker, method), *job)))
                if len(waiting) > JOBS_IN_HAND:
                    first, answer = waiting.popleft()
                    yield first, answer.result()
            for first, answer in waiting:
                yield first, answer.result()
