"""What a fine-tuning has reached, kept in the store: ``decoders/<name>/progress/<step, nine digits>.json`` and tensors.

The manifest is written after its tensors, so that whatever is listed is complete. Random draws are functions of seed
and step, so weights, averages and optimizer moments are all there is to keep.
"""

from __future__ import annotations

import hashlib
import logging
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from starflow import manifest
from starflow.config import Config
from starflow.decoders import PREFIX
from starflow.errors import CorruptError, NotFoundError
from starflow.manifest import ObjectRef
from starflow.objectstore import ObjectStore

log = logging.getLogger(__name__)

KIND, VERSION = "decoder-progress", 1
#: Progress that is kept: the newest, and one to fall back to.
KEPT = 2


class Progress(Config):
    """A fine-tuning after some steps."""

    step: int
    config: dict[str, Any]
    pictures: str = Field(description="Identity of the pictures.")
    tensors: ObjectRef


def save_progress(
    store: ObjectStore, name: str, step: int, config: dict[str, Any], pictures: str, tensors: dict[str, Tensor]
) -> None:
    """Commits the progress, then deletes all but the newest. Raises AlreadyExistsError for two writers of one name."""
    data = save({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
    folder = f"{PREFIX}{name}/progress/"
    ref = manifest.put(store, f"{folder}{step:09d}-{hashlib.sha256(data).hexdigest()[:16]}.safetensors", data)
    progress = Progress(step=step, config=config, pictures=pictures, tensors=ref)
    manifest.commit(store, f"{folder}{step:09d}.json", KIND, VERSION, progress.model_dump(mode="json"))
    delete_progress(store, name, kept=KEPT)


def list_progress(store: ObjectStore, name: str) -> list[str]:
    """Keys of the manifests, newest first."""
    return sorted((i.key for i in store.list(f"{PREFIX}{name}/progress/") if i.key.endswith(".json")), reverse=True)


def load_progress(store: ObjectStore, name: str) -> tuple[Progress, dict[str, Tensor]] | None:
    """The newest whole progress with its tensors; None before any. What was damaged is deleted, with a warning.

    Raises CorruptError when there is progress but none is whole, StoreError for another release's: then nothing is
    deleted.
    """
    damaged: dict[str, Exception] = {}
    for key in list_progress(store, name):
        try:
            progress = manifest.load_as(Progress, store, key, KIND, VERSION)
            tensors = load(manifest.get(store, progress.tensors))
        except (CorruptError, NotFoundError, SafetensorError) as error:
            log.warning("going back to an earlier step: %s", error)
            damaged[key] = error
            continue
        store.delete(damaged)
        return progress, tensors
    if damaged:
        raise CorruptError(
            f"decoder {name!r} has progress but none of {len(damaged)} is whole ({next(iter(damaged.values()))}); "
            f"restore the objects of one in {store.url}, or use another name"
        )
    return None


def delete_progress(store: ObjectStore, name: str, kept: int = 0) -> None:
    """Deletes all but the `kept` newest: manifests before what they name."""
    manifests = list_progress(store, name)
    store.delete(manifests[kept:])
    stems = tuple(key.removesuffix(".json") for key in manifests[:kept])
    store.delete([info.key for info in store.list(f"{PREFIX}{name}/progress/") if not info.key.startswith(stems)])


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """The optimizer's state as ``<prefix>/<number of the parameter>/<name>``."""
    state = optimizer.state_dict()["state"]
    return {f"{prefix}/{i}/{name}": value for i, values in state.items() for name, value in values.items()}


def fill_optimizer(optimizer: torch.optim.Optimizer, prefix: str, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in with_prefix(tensors, prefix).items():
        number, _, name = key.partition("/")
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors called ``<prefix>/...``, without it."""
    return {k.removeprefix(f"{prefix}/"): v for k, v in tensors.items() if k.startswith(f"{prefix}/")}
