"""Captions many pictures in chunks that are committed one by one: a kill costs at most the chunks in hand.

A captioner behind an endpoint is asked from here. A Hugging Face model runs on Ray actors, each of which fetches,
decodes and captions a chunk a call; a chunk whose actor died is given to another.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any, Protocol

from PIL import Image

from pipelines.actors import JOBS_IN_HAND, Job, Resources, actor_pool
from pipelines.captioners import CaptionConfig, Captioner, load_captioner
from pipelines.originals import Picture, fetch, spans
from starflow import manifest
from starflow.errors import AlreadyExistsError, NotFoundError
from starflow.images import ImageError, decode_image
from starflow.objectstore import ObjectStore, open_store

KIND, VERSION = "captions", 1
#: Pictures of a chunk.
CHUNK = 64


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
        self, record: str, images: dict[int, Image.Image], alts: Sequence[str], decoded: int = 0
    ) -> dict[str, int]:
        """Commits, under the key `record`, a caption for each of `alts`, of the images by row; returns their counts.

        `decoded` of the images come from latents.
        """
        rows = list(images)
        answers = self.captioner.caption([images[row] for row in rows], [alts[row] for row in rows])
        captions = [""] * len(alts)
        for row, text in zip(rows, answers, strict=True):
            captions[row] = " ".join(text.split())
        counts = {"original": len(rows) - decoded, "decoded": decoded}
        try:
            manifest.commit(self.store, record, KIND, VERSION, {"captions": captions, "pictures": counts})
        except AlreadyExistsError:  # another worker, thought dead, was first: its captions hold
            return load_chunk(self.store, record)[1]
        return counts


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


def load_chunk(store: ObjectStore, record: str) -> tuple[list[str], dict[str, int]]:
    """A committed chunk's captions, and how its pictures were had."""
    body = manifest.load(store, record, KIND, VERSION)
    return body["captions"], body["pictures"]


def chunk_key(prefix: str, number: int) -> str:
    """Key of the record of chunk `number`."""
    return f"{prefix}{number:06d}.json"


class Captioning:
    """A captioner at work on pictures in a store."""

    def __init__(self, store: ObjectStore, pool: Pool) -> None:
        self.store, self.pool = store, pool
        self.name, self.version = pool.ask("identity")

    def captions(self, prefix: str, pictures: Sequence[Picture], alts: Sequence[str]) -> list[str]:
        """One caption for each of `alts`; `pictures` are theirs by row. Chunks are kept under the key `prefix`."""
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
        return [text for number in range(chunks) for text in load_chunk(self.store, chunk_key(prefix, number))[0]]


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
