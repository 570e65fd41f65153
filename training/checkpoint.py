"""Checkpoints, the writing side: copy to memory, upload behind the training, commit last.

A save stops training only while this rank's share is copied into shared memory that already has the layout of
the safetensors objects to be stored. A thread then lets the uploader process send them, the ranks agree on the
outcome over a process group of their own, and rank 0 has the manifest created. A rank that dies anywhere
before that leaves nothing a reader can see.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import threading
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from starflow import __version__
from starflow.checkpoints import Checkpoint, Progress, Shard, TrainedInfo, checkpoint_key
from starflow.errors import StoreError
from training.config import TrainConfig
from training.ema import EMA
from training.engine import MOMENTS, Engine
from training.uploader import Uploader, UploaderDied

log = logging.getLogger(__name__)

_DTYPES = {torch.float32: ("F32", np.float32), torch.uint8: ("U8", np.uint8)}
_PAGE = 4096
#: An uploader that was killed is started again and asked again so many times for one save.
_UPLOADER_ATTEMPTS = 3


class Snapshot:
    """Shared memory that holds three safetensors objects; `copy` refreshes their data from the live tensors."""

    def __init__(self, objects: dict[str, dict[str, Tensor]]) -> None:
        headers = {kind: _header(tensors) for kind, tensors in objects.items()}
        #: kind: (offset, size) of the object in the shared memory.
        self.ranges: dict[str, tuple[int, int]] = {}
        offset = 0
        for kind, tensors in objects.items():
            size = len(headers[kind]) + sum(t.numel() * t.element_size() for t in tensors.values())
            self.ranges[kind] = (offset, size)
            offset += -(-size // _PAGE) * _PAGE
        self.size = offset
        self.descriptor = os.memfd_create("starflow-checkpoint")
        os.ftruncate(self.descriptor, self.size)
        self._memory = mmap.mmap(self.descriptor, self.size)
        self._pairs: list[tuple[Tensor, Tensor]] = []
        for kind, tensors in objects.items():
            position = self.ranges[kind][0]
            self._memory[position : position + len(headers[kind])] = headers[kind]
            self._map(tensors, position + len(headers[kind]))
        if torch.cuda.is_available():
            self._pin()
        self.copy()  # touches every page, so that the first save is as quick as the others

    def copy(self) -> None:
        """Copies the live tensors; when it returns they may change."""
        for target, source in self._pairs:
            target.copy_(source, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def close(self) -> None:
        """Gives the memory back; no view of it may be in use."""
        self._pairs.clear()
        os.close(self.descriptor)

    def _map(self, tensors: dict[str, Tensor], offset: int) -> None:
        for tensor in tensors.values():
            target = torch.from_numpy(
                np.frombuffer(self._memory, _DTYPES[tensor.dtype][1], tensor.numel(), offset)  # type: ignore[arg-type]
            )
            self._pairs.append((target, tensor))
            offset += tensor.numel() * tensor.element_size()

    def _pin(self) -> None:
        address = np.frombuffer(self._memory, np.uint8).ctypes.data
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, self.size, 0))


def _header(tensors: dict[str, Tensor]) -> bytes:
    """Length and JSON header of a safetensors file, padded so that the data is aligned."""
    entries, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _DTYPES[tensor.dtype][0],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def shard_tensors(engine: Engine, ema: EMA, random: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """This rank's three objects: tensors by name, see starflow/checkpoints.py."""
    pairs = list(zip(engine.fragments, ema.averages, strict=True))
    optimizer = {f"{key}/{f.name}@{f.start}": getattr(f, key) for f in engine.fragments for key in MOMENTS}
    return {
        "weights": {f"{f.name}@{f.start}": f.master for f in engine.fragments},
        "ema": {f"{f.name}@{f.start}": average for f, average in pairs},
        "optimizer": {**optimizer, **random},
    }


def random_states() -> dict[str, Tensor]:
    """States of this process's global generators; nothing in training draws from them, a model might."""
    states = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random/cuda"] = torch.cuda.get_rng_state()
    return states


class Saver:
    """Saves of this rank: one in flight. Its methods are called by all ranks at the same steps."""

    def __init__(self, config: TrainConfig, store: str, engine: Engine, ema: EMA, owner: str) -> None:
        self._config, self._engine, self._owner = config, engine, owner
        self._rank = dist.get_rank()
        self._group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=3 * config.save_timeout + 60))
        self._random = random_states()
        self._snapshot = Snapshot(shard_tensors(engine, ema, self._random))
        token = [uuid.uuid4().hex[:12]]
        dist.broadcast_object_list(token, 0, group=self._group)
        self._token = token[0]
        self._uploader = Uploader(store, self._snapshot.descriptor, self._snapshot.size)
        self._thread: threading.Thread | None = None
        #: Saves that failed since the last one that committed, and why the last one did.
        self.failures = 0
        self.error, self._lost = "", ""
        #: Last step known to be committed.
        self.committed: int | None = None

    @property
    def busy(self) -> bool:
        """Whether a save is in flight on this rank."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self, trained: TrainedInfo, progress: Progress, metrics: Path | None) -> None:
        """Copies this rank's state and goes on in the background. Only when no save is in flight anywhere."""
        self.wait(lambda: None)
        for name, state in random_states().items():
            self._random[name].copy_(state)
        self._snapshot.copy()
        length = metrics.stat().st_size if metrics else 0
        work = (trained, progress, {"path": str(metrics), "size": length})
        self._thread = threading.Thread(target=self._save, args=work, name="save", daemon=True)
        self._thread.start()

    def wait(self, beat: Callable[[], None]) -> None:
        """Blocks until no save is in flight, calling `beat` meanwhile. Raises RuntimeError when it has lost a rank.

        That is no failed save: another attempt, with all ranks, may well save.
        """
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(timeout=0.2)
            beat()
        self._thread = None
        if self._lost:
            raise RuntimeError(self._lost)

    def close(self) -> None:
        """Ends the uploader."""
        self._uploader.close()

    def _save(self, trained: TrainedInfo, progress: Progress, metrics: dict[str, Any]) -> None:
        """The whole protocol; every rank takes part in both agreements whatever has happened to it."""
        outcomes: list[Any] = [None] * self._config.ranks
        uploaded = self._upload(trained.step, metrics)
        try:
            dist.all_gather_object(outcomes, uploaded, group=self._group)
            error = next((f"rank {rank}: {o}" for rank, o in enumerate(outcomes) if isinstance(o, str)), None)
            if error is None and self._rank == 0:
                error = self._commit(trained, progress, metrics, outcomes)
            verdict = [error]
            dist.broadcast_object_list(verdict, 0, group=self._group)
        except RuntimeError as lost:  # a rank is gone, and training is about to notice, too
            self._lost = f"a rank was lost while saving step {trained.step}: {lost}"
            return
        if verdict[0] is None:
            self.failures, self.error, self.committed = 0, "", trained.step
        else:
            self.failures, self.error = self.failures + 1, verdict[0]
            if self._rank == 0:
                log.warning("the save of step %d failed: %s", trained.step, self.error)

    def _folder(self, step: int) -> str:
        return f"runs/{self._config.run}/shards/{step:09d}-{self._token}"

    def _upload(self, step: int, metrics: dict[str, Any]) -> list[dict[str, Any]] | str:
        """References of this rank's objects, or the sentence that says why there are none."""
        folder = self._folder(step)
        objects = [
            {"key": f"{folder}/{kind}-{self._rank:05d}.safetensors", "offset": offset, "size": size}
            for kind, (offset, size) in self._snapshot.ranges.items()
        ]
        files = [{**metrics, "key": f"{folder}/metrics.jsonl"}] if self._rank == 0 else []
        try:
            refs = self._persist(lambda: self._uploader.upload(objects, files, self._config.save_timeout))
        except (StoreError, OSError) as error:
            return str(error)
        return [ref.model_dump() for ref in refs]

    def _commit(
        self, trained: TrainedInfo, progress: Progress, metrics: dict[str, Any], refs: Sequence[Any]
    ) -> str | None:
        shards = tuple(Shard(weights=r[0], ema=r[1], optimizer=r[2]) for r in refs)
        checkpoint = Checkpoint(
            run=self._config.run,
            step=trained.step,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            code=__version__,
            ranks=self._config.ranks,
            zero_stage=self._config.zero_stage,
            shards=shards,
            parameters=self._engine.shapes,
            model=self._engine.flow.config.to_dict(),
            trained=trained,
            progress=progress,
            config=self._config.model_dump(mode="json"),
            metrics=refs[0][3],
        )
        request = {
            "run": self._config.run,
            "owner": self._owner,
            "key": checkpoint_key(self._config.run, trained.step),
            "draft": f"{self._folder(trained.step)}/manifest.json",
            "body": checkpoint.model_dump(mode="json"),
            "metrics": metrics,
            "keep_newest": self._config.keep_newest,
            "keep_every": self._config.keep_every,
        }
        try:
            remark = self._persist(lambda: self._uploader.commit(dict(request), self._config.save_timeout))
            if remark:
                log.warning(remark)
        except (StoreError, OSError) as error:
            return str(error)
        return None

    @staticmethod
    def _persist(ask: Callable[[], Any]) -> Any:
        """Asks again when the uploader was killed: everything it does can be done twice."""
        for attempt in range(_UPLOADER_ATTEMPTS):
            try:
                return ask()
            except UploaderDied:
                if attempt == _UPLOADER_ATTEMPTS - 1:
                    raise
        return None
