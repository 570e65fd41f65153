"""Encodes one shard: fetch, decode and resize in threads, the VAE in the middle, whole objects out."""

from __future__ import annotations

import io
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipelines.encode_plan import EncodeConfig, Models, PlannedPart
from pipelines.originals import Picture, fetch, spans
from starflow import manifest
from starflow.encoders import VAE, TextEncoder, load_text_encoder, load_vae, to_tensor
from starflow.errors import AlreadyExistsError, CorruptError, NotFoundError, StoreError
from starflow.images import ImageError, decode_image, fit
from starflow.objectstore import ObjectStore, open_store
from starflow.parts import text_array, write_shard
from starflow.shardindex import ShardRef

KIND, VERSION = "encoded-shard", 1
#: Batches decoded ahead of the VAE.
AHEAD = 3
CPU_BATCH, GPU_BATCH = 16, 256


@dataclass(frozen=True)
class EncodedShard:
    """A finished shard and why samples of it were dropped."""

    ref: ShardRef
    dropped: dict[str, int]


def marker_key(work: str, part: str, shard: int) -> str:
    """Key of the record that says a shard is finished."""
    return f"{work}/shards/{part}/{shard:06d}.json"


def load_marker(store: ObjectStore, work: str, part: str, shard: int) -> EncodedShard:
    """What a finished shard's record says."""
    body = manifest.load(store, marker_key(work, part, shard), KIND, VERSION)
    return EncodedShard(ShardRef.model_validate(body["ref"]), body["dropped"])


def read_members(store: ObjectStore, part: PlannedPart) -> pq.ParquetFile:
    """The members of a part, one row group a shard."""
    return pq.ParquetFile(io.BytesIO(manifest.get(store, part.members)))


class ShardEncoder:
    """Holds the encoders and makes one shard a call; calls from two threads share the VAE in turns."""

    def __init__(self, store: str, config: EncodeConfig, work: str) -> None:
        self.store, self.config, self.work = open_store(store), config, work
        self.batch_size = config.vae_batch or (GPU_BATCH if config.gpus_per_actor else CPU_BATCH)
        self.threads = ThreadPoolExecutor(config.cpus_per_actor + 1, thread_name_prefix="decode")
        self.turn = threading.Lock()

    @cached_property
    def encoders(self) -> tuple[VAE, TextEncoder | None]:
        """The VAE and the text encoder, on the GPU where the configuration reserves one."""
        torch.set_num_threads(self.config.cpus_per_actor)
        device = "cuda" if self.config.gpus_per_actor else "cpu"
        vae, name = load_vae(self.config.vae, device), self.config.text_encoder
        return vae, load_text_encoder(name, self.config.text_length, device) if name else None

    def models(self) -> Models:
        """Identities and shapes of the encoders, loaded now if they were not; call it before the rest."""
        vae, text = self.encoders
        return Models(
            vae=vae.identity,
            text=text.identity if text else None,
            text_shape=(text.length, text.width) if text else None,
        )

    def encode(self, part: PlannedPart, shard: int) -> EncodedShard:
        """Makes shard number `shard` of `part`, unless somebody has; either way returns what is now there."""
        plan, (vae, _) = part.plan, self.encoders
        if vae.identity != plan.vae:
            raise StoreError(
                f"the plan is for the VAE {plan.vae.name} ({plan.vae.sha256[:12]}), {self.config.vae} is now "
                f"{vae.identity.name} ({vae.identity.sha256[:12]}); use another work prefix"
            )
        members = read_members(self.store, part).read_row_group(shard)
        down = vae.downsampling
        mean, std, failures = self._latents(_pictures(members), plan.grid[0] * down, plan.grid[1] * down)
        ids = [None if row in failures else id for row, id in enumerate(members["id"].to_pylist())]
        arrays: dict[str, Any] = {"mean": mean, "std": std}
        for number, layer in enumerate(plan.layers):
            if layer.text is not None:
                captions = members[f"caption:{number}"].to_pylist()
                wanted = [text if id is not None else None for text, id in zip(captions, ids, strict=True)]
                arrays[text_array(number)] = self._text_states(wanted)
        ref = write_shard(self.store, plan, shard, arrays, ids)
        body = {"ref": ref.model_dump(mode="json"), "dropped": dict(Counter(failures.values()))}
        try:
            manifest.commit(self.store, marker_key(self.work, plan.id, shard), KIND, VERSION, body)
        except AlreadyExistsError:
            return load_marker(self.store, self.work, plan.id, shard)
        return EncodedShard(ref, body["dropped"])

    def _latents(
        self, pictures: Sequence[Picture], height: int, width: int
    ) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
        """Posterior mean and std (rows, C, h, w) float16; rows that failed are zero and named with a reason."""
        failures: dict[int, str] = {}
        vae, _ = self.encoders
        shape = (len(pictures), vae.channels, height // vae.downsampling, width // vae.downsampling)
        mean, std = np.zeros(shape, np.float16), np.zeros(shape, np.float16)
        rows: list[int] = []
        pixels: list[np.ndarray] = []
        for row, result in self._decoded(pictures, height, width):
            if isinstance(result, str):
                failures[row] = result
            else:
                rows.append(row)
                pixels.append(result)
            if len(rows) >= self.batch_size:
                mean[rows], std[rows] = self._encode(np.stack(pixels))
                rows, pixels = [], []
        if rows:
            mean[rows], std[rows] = self._encode(np.stack(pixels))
        broken = ~(np.isfinite(mean).all(axis=(1, 2, 3)) & np.isfinite(std).all(axis=(1, 2, 3)))
        mean[broken], std[broken] = 0, 0
        failures |= dict.fromkeys(np.flatnonzero(broken).tolist(), "latents not finite")
        return mean, std, failures

    def _encode(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(B, H, W, 3) uint8 to two arrays (B, C, h, w) float16, in smaller batches when a GPU is too small."""
        vae, _ = self.encoders
        try:
            with self.turn:
                found = vae.encode(to_tensor(pixels))
                mean, std = (latents.half().cpu().numpy() for latents in found)
        except torch.OutOfMemoryError:
            if len(pixels) == 1:
                raise
            half = (len(pixels) + 1) // 2
            self.batch_size = min(self.batch_size, half)
            torch.cuda.empty_cache()
            first, second = self._encode(pixels[:half]), self._encode(pixels[half:])
            return np.concatenate([first[0], second[0]]), np.concatenate([first[1], second[1]])
        return mean, std

    def _text_states(self, captions: Sequence[str | None]) -> np.ndarray:
        """(rows, L, E) float16, zero where there is no caption."""
        _, text = self.encoders
        assert text is not None  # the plan asks for text states only with a text encoder
        states = np.zeros((len(captions), text.length, text.width), np.float16)
        present = [row for row, caption in enumerate(captions) if caption]
        for start in range(0, len(present), 256):
            rows = present[start : start + 256]
            with self.turn:
                states[rows] = text.encode([captions[row] or "" for row in rows]).half().cpu().numpy()
        return states

    def _decoded(self, pictures: Sequence[Picture], height: int, width: int) -> Iterator[tuple[int, np.ndarray | str]]:
        """(row, pixels or the reason why there are none), fetched and decoded a few batches ahead."""
        waiting: deque[tuple[int, Future[np.ndarray | str]]] = deque()
        for span in spans(pictures):
            for picture, data in _fetch(self.store, span):
                waiting.append((picture.row, self.threads.submit(_decode, data, height, width)))
                while len(waiting) > AHEAD * self.batch_size:
                    row, pending = waiting.popleft()
                    yield row, pending.result()
        for row, pending in waiting:
            yield row, pending.result()


def _pictures(members: pa.Table) -> list[Picture]:
    columns = [members[name].to_pylist() for name in ("image_key", "image_offset", "image_size")]
    return [Picture(row, *place) for row, place in enumerate(zip(*columns, strict=True))]


def _fetch(store: ObjectStore, span: Sequence[Picture]) -> Iterator[tuple[Picture, bytes]]:
    try:
        yield from fetch(store, span)
    except NotFoundError as error:
        raise CorruptError(f"pictures at {span[0].key} are gone ({error}); crawl these URLs again") from error


def _decode(data: bytes, height: int, width: int) -> np.ndarray | str:
    try:
        return fit(decode_image(data, cover=(height, width)), height, width)
    except ImageError:
        return "corrupt"
