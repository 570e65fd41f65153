"""Checkpoints, the reading side: what sampling, scoring and export need, without the training stack.

A checkpoint is a manifest ``runs/<run>/checkpoints/<step, nine digits>.json``, created last, that names its
objects with size and SHA-256. Each rank of the run that wrote it left three safetensors objects: float32
weights, their moving average and the optimizer's moments. A tensor in them is a fragment, a contiguous range of
one flattened parameter, and is called ``<parameter>@<first index>`` (moments: ``exp_avg/<parameter>@<first
index>``). So a checkpoint can be read whatever the number of ranks or the ZeRO stage it came from.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from starflow import manifest
from starflow.architecture import FlowConfig
from starflow.config import Config
from starflow.encoders import TextIdentity, VAEIdentity
from starflow.errors import ConfigError, CorruptError, NotFoundError
from starflow.manifest import ObjectRef
from starflow.objectstore import ObjectStore

if TYPE_CHECKING:  # listing checkpoints, and supervising, need no torch
    from torch import Tensor

KIND, VERSION = "checkpoint", 1

Weights = Literal["ema", "weights"]
_BLOCK = 2**26


class TrainedInfo(Config):
    """What a model was trained on and with: sampling and scoring need the same."""

    run: str
    step: int = Field(description="Steps taken.")
    samples: int = Field(description="Samples seen, repetitions counted.")
    snapshot: str = Field(description="Id of the snapshot it was trained on.")
    vae: VAEIdentity = Field(description="The VAE of the latents; its name is what starflow.encoders loads.")
    text_encoder: str | None = Field(description="What starflow.encoders.load_text_encoder takes; none for no text.")
    text_identity: TextIdentity | None = None
    latent_noise: float = Field(description="Standard deviation of the noise that training added to latents.")
    held_out: float = Field(description="Fraction of the snapshot it never saw; SnapshotReader takes the same.")
    attribution: str | None = Field(None, description="To be shown wherever pictures from this model appear.")


class Shard(Config):
    """The objects of one rank."""

    weights: ObjectRef
    ema: ObjectRef
    optimizer: ObjectRef


class Progress(Config):
    """Everything but tensors that decides how training goes on."""

    samples: int
    optimizer_steps: int = Field(description="Updates applied; steps minus skipped batches.")
    skipped: int = Field(0, description="Batches skipped so far.")
    skipped_in_a_row: int = 0
    usual_norm: float | None = Field(None, description="Running average of the gradient norm, for spikes.")
    held_out_bits: float | None = Field(None, description="Last held-out bits per dimension.")


class Checkpoint(Config):
    """A committed checkpoint's manifest."""

    run: str
    step: int
    created: str
    code: str = Field(description="Version of starflow that wrote it.")
    ranks: int
    zero_stage: int
    shards: tuple[Shard, ...]
    parameters: dict[str, tuple[int, ...]] = Field(description="Parameter name: shape.")
    model: dict[str, Any] = Field(description="The architecture, FlowConfig.to_dict().")
    trained: TrainedInfo
    progress: Progress
    config: dict[str, Any] = Field(description="The training configuration.")
    metrics: ObjectRef = Field(description="metrics.jsonl up to this step.")

    @property
    def flow(self) -> FlowConfig:
        """The architecture."""
        return FlowConfig(**self.model)

    def objects(self) -> Iterator[ObjectRef]:
        """Every object that must be there."""
        for shard in self.shards:
            yield from (shard.weights, shard.ema, shard.optimizer)
        yield self.metrics


def checkpoint_key(run: str, step: int) -> str:
    """Key of the manifest."""
    return f"runs/{run}/checkpoints/{step:09d}.json"


def list_runs(store: ObjectStore) -> list[str]:
    """Names of the runs that the store knows, those with a ``run.json``, sorted."""
    paths = (info.key.split("/") for info in store.list("runs/"))
    return sorted(path[1] for path in paths if len(path) == 3 and path[2] == "run.json")


def list_steps(store: ObjectStore, run: str) -> list[int]:
    """Steps of the run's committed checkpoints, ascending."""
    names = (info.key.rpartition("/")[2] for info in store.list(f"runs/{run}/checkpoints/"))
    return [int(name.removesuffix(".json")) for name in names if name.removesuffix(".json").isdigit()]


def load_manifest(store: ObjectStore, run: str, step: int | Literal["newest"] = "newest") -> Checkpoint:
    """The manifest of a checkpoint. Raises NotFoundError naming what there is, StoreError for another release's."""
    steps = list_steps(store, run)
    if not steps:
        raise no_checkpoints(store, run)
    wanted = steps[-1] if step == "newest" else step
    if wanted not in steps:
        known = ", ".join(map(str, steps))
        raise NotFoundError(f"checkpoint {step} of run {run!r} is not in {store.url}; committed steps: {known}")
    return manifest.load_as(Checkpoint, store, checkpoint_key(run, int(wanted)), KIND, VERSION)


def no_checkpoints(store: ObjectStore, run: str) -> NotFoundError:
    """Why the run has none, and what to ask for instead."""
    runs = list_runs(store)
    if run in runs:
        return NotFoundError(f"run {run!r} in {store.url} has no committed checkpoint yet; train it further")
    if runs:
        return NotFoundError(f"run {run!r} is not in {store.url}; choose one of its runs: {', '.join(runs)}")
    return NotFoundError(
        f"run {run!r} is not in {store.url}, which holds no runs; check the store (a checkpoint is written STORE/RUN "
        "or STORE/RUN@STEP, for example s3://starflow/emoji@300)"
    )


def verify(store: ObjectStore, checkpoint: Checkpoint) -> int:
    """Reads every object and checks it; bytes read. Raises NotFoundError or CorruptError."""
    total = 0
    for ref in checkpoint.objects():
        digest, size = hashlib.sha256(), 0
        while block := store.read(ref.key, size, _BLOCK):
            digest.update(block)
            size += len(block)
            if len(block) < _BLOCK:
                break
        manifest.check(store, ref, size, digest.hexdigest())
        total += size
    return total


def load_checkpoint(
    store: ObjectStore, run: str, step: int | Literal["newest"] = "newest", ema: bool = True
) -> tuple[FlowConfig, dict[str, Tensor], TrainedInfo]:
    """Architecture, float32 state dict (moving average or raw weights) and provenance of a checkpoint.

    Raises NotFoundError or CorruptError.
    """
    checkpoint = load_manifest(store, run, step)
    return checkpoint.flow, read_weights(store, checkpoint, "ema" if ema else "weights"), checkpoint.trained


def read_weights(store: ObjectStore, checkpoint: Checkpoint, kind: Weights) -> dict[str, Tensor]:
    """Whole float32 parameters by name. Raises NotFoundError or CorruptError."""
    return dict(iterate_weights(store, checkpoint, kind))


def iterate_weights(store: ObjectStore, checkpoint: Checkpoint, kind: Weights) -> Iterator[tuple[str, Tensor]]:
    """Whole float32 parameters, one in memory at a time: the checked shards lie in a temporary folder meanwhile."""
    import torch

    with tempfile.TemporaryDirectory(prefix="starflow-") as folder:
        paths = [Path(folder) / f"{number}.safetensors" for number in range(len(checkpoint.shards))]
        for path, shard in zip(paths, checkpoint.shards, strict=True):
            manifest.download(store, getattr(shard, kind), path)
        with FragmentReader(paths) as reader:
            for name, shape in checkpoint.parameters.items():
                tensor = torch.empty(shape)
                reader.read_into(name, 0, tensor.view(-1))
                yield name, tensor


class FragmentReader:
    """Ranges of named parameters out of safetensors files whose tensors are called ``name@start``."""

    def __init__(self, paths: Iterable[Path]) -> None:
        from safetensors import SafetensorError, safe_open

        self._files: list[Any] = []
        self._index: dict[str, list[tuple[int, Any, str]]] = {}
        for path in paths:
            try:
                file = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise CorruptError(f"{path} is not a safetensors file: {error}") from error
            self._files.append(file)
            for key in file.keys():  # noqa: SIM118 - not a mapping
                name, at, start = key.rpartition("@")
                if at:
                    self._index.setdefault(name, []).append((int(start), file, key))
        for fragments in self._index.values():
            fragments.sort(key=lambda fragment: fragment[0])

    def __enter__(self) -> FragmentReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._index.clear()
        self._files.clear()

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fills `out` (n,) with the values from `start` on. Raises CorruptError for a gap."""
        filled = 0
        for first, file, key in self._index.get(name, []):
            if first > start + filled:
                break
            view = file.get_slice(key)
            (length,) = view.get_shape()
            skip = start + filled - first
            count = min(length - skip, len(out) - filled)
            if count > 0:
                out[filled : filled + count].copy_(view[skip : skip + count])
                filled += count
        if filled < len(out):
            raise CorruptError(f"the checkpoint's files hold {filled} of {len(out)} values of {name} from {start} on")


def fragments_in(header: bytes) -> dict[str, int]:
    """Tensor name to number of values, from a safetensors header (JSON). Raises CorruptError."""
    try:
        entries = json.loads(header)
        return {k: math.prod(v["shape"]) for k, v in entries.items() if k != "__metadata__"}
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptError(f"unreadable safetensors header: {error}") from error


def export(store: ObjectStore, checkpoint: Checkpoint, folder: Path, ema: bool = True) -> Path:
    """Writes ``model.safetensors`` (float32) and ``config.json`` to `folder`, one parameter in memory at a time.

    `starflow.generate.Generator.open` and `starflow.convert.read_model` read the folder.
    """
    import torch

    from starflow.convert import write_safetensors

    folder.mkdir(parents=True, exist_ok=True)
    layout = {name: (torch.float32, torch.Size(shape)) for name, shape in checkpoint.parameters.items()}
    weights = iterate_weights(store, checkpoint, "ema" if ema else "weights")
    write_safetensors(folder / "model.safetensors", layout, weights)
    text = json.dumps({"model": checkpoint.model, "trained": checkpoint.trained.model_dump()}, indent=1)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    return folder


def parse_checkpoint(uri: str) -> tuple[str, str, int | Literal["newest"]]:
    """Store, run and step of ``STORE/RUN`` or ``STORE/RUN@STEP``. Raises ConfigError for another form."""
    store, _, name = uri.rstrip("/").rpartition("/")
    run, at, step = name.partition("@")
    if not store or store.endswith(":/") or not run or (at and step != "newest" and not step.isdigit()):
        raise ConfigError(
            f"checkpoint {uri!r} is neither STORE/RUN or STORE/RUN@STEP, for example s3://starflow/emoji@300, nor the "
            "folder of an exported model"
        )
    return store, run, int(step) if step.isdigit() else "newest"
