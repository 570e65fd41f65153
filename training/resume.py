"""Continuing from the store: the newest committed checkpoint that verifies, on any ranks and ZeRO stage."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from starflow import manifest
from starflow.cache import PAUSES, FileCache, full_disk
from starflow.checkpoints import (
    Checkpoint,
    FragmentReader,
    Shard,
    TrainedInfo,
    checkpoint_key,
    fragments_in,
    list_steps,
    load_manifest,
)
from starflow.errors import ConfigError, CorruptError, NotFoundError, StoreError
from starflow.manifest import ObjectRef
from starflow.objectstore import ObjectStore, file_sha256
from training.checkpoint import random_states
from training.config import TrainConfig
from training.ema import EMA
from training.engine import MOMENTS, Engine, Fragment
from training.record import check_same_config

log = logging.getLogger(__name__)


def resume(store: ObjectStore, config: TrainConfig, engine: Engine, ema: EMA) -> Checkpoint | None:
    """Fills engine and average from the run's newest good checkpoint; None when the run has none yet.

    All ranks call it and agree on the step: when one of them cannot read and verify it, the one before is tried.
    Those that were passed over are set aside by rank 0, but not before an older one is loaded: while none verifies
    all stay, for whoever restores their objects. Raises CorruptError then, ConfigError for another configuration.
    """
    folder = config.folder / "resume" / str(dist.get_rank())
    passed_over: dict[int, str] = {}
    steps = [list_steps(store, config.run)]
    dist.broadcast_object_list(steps, 0)
    checkpoint: Checkpoint | None
    reason: str | None
    for step in reversed(steps[0]):
        try:
            checkpoint = load_manifest(store, config.run, step)
            check_same_run(config, engine, checkpoint)
            _download(store, checkpoint, engine, folder, config.shard_cache)
            reason = None
        except (CorruptError, NotFoundError) as error:
            checkpoint, reason = None, str(error)
        reasons: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, reason)
        if checkpoint is not None and not any(reasons):
            fill(engine, ema, checkpoint, folder)
            shutil.rmtree(folder)
            if dist.get_rank() == 0:
                _set_aside(store, config.run, passed_over)
            return checkpoint
        passed_over[step] = next(reason for reason in reasons if reason)
        if dist.get_rank() == 0:
            log.warning("checkpoint %d does not verify, going back to the one before: %s", step, passed_over[step])
    if passed_over:
        newest, reason = next(iter(passed_over.items()))
        raise CorruptError(
            f"run {config.run!r} has checkpoints but none verifies ({', '.join(map(str, steps[0]))}; of {newest}: "
            f"{reason}); restore the objects of one in {store.url}, or start another run"
        )
    return None


def check_same_run(config: TrainConfig, engine: Engine, checkpoint: Checkpoint) -> None:
    """Raises ConfigError naming both sides when the checkpoint is not this configuration's."""
    model = engine.flow.config.to_dict()
    theirs = checkpoint.flow.to_dict()
    for key in model:
        if model[key] != theirs[key]:
            raise ConfigError(
                f"run {config.run!r} has a model with {key} = {theirs[key]}, the configuration asks for {model[key]}; "
                "use the run's own configuration, or another run name"
            )
    check_same_config(config, checkpoint.config)


def check_same_encoders(ours: TrainedInfo, theirs: TrainedInfo, whose: str) -> None:
    """Raises ConfigError when the weights to start from know another VAE's latents or another encoder's states."""
    if ours.vae.sha256 != theirs.vae.sha256:
        raise ConfigError(
            f"{whose} was trained on latents of VAE {theirs.vae.name} (weights {theirs.vae.sha256[:12]}), snapshot "
            f"{ours.snapshot} has those of {ours.vae.name} ({ours.vae.sha256[:12]}); choose a snapshot of the first"
        )
    mine, others = ours.text_identity, theirs.text_identity
    if mine and others and mine.sha256 != others.sha256:
        raise ConfigError(
            f"{whose} was trained with text encoder {others.name} (weights {others.sha256[:12]}), this configuration "
            f"has {mine.name} ({mine.sha256[:12]}); set text_encoder to the first"
        )


def fill(engine: Engine, ema: EMA, checkpoint: Checkpoint, folder: Path) -> None:
    """Fills masters, average and moments of this rank from the files in `folder`, then the model's weights."""
    kinds = {kind: sorted(folder.glob(f"{kind}-*.safetensors")) for kind in Shard.model_fields}
    fragments = engine.fragments
    _read(kinds["weights"], "", fragments, [fragment.master for fragment in fragments])
    _read(kinds["ema"], "", fragments, ema.averages)
    for key in MOMENTS:
        _read(kinds["optimizer"], f"{key}/", fragments, [getattr(fragment, key) for fragment in fragments])
    engine.set_optimizer_steps(checkpoint.progress.optimizer_steps)
    engine.publish_masters()
    if checkpoint.ranks == dist.get_world_size():
        _restore_random(folder / f"optimizer-{dist.get_rank():05d}.safetensors")


def _read(paths: Iterable[Path], prefix: str, fragments: Sequence[Fragment], targets: Sequence[Tensor]) -> None:
    with FragmentReader(paths) as reader, torch.no_grad():
        for fragment, target in zip(fragments, targets, strict=True):
            reader.read_into(prefix + fragment.name, fragment.start, target)


def _restore_random(path: Path) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        saved = {name: file.get_tensor(name) for name in random_states() if name in file.keys()}  # noqa: SIM118
    if "random/cpu" in saved:
        torch.set_rng_state(saved["random/cpu"])
    if "random/cuda" in saved:
        torch.cuda.set_rng_state(saved["random/cuda"])


def _download(store: ObjectStore, checkpoint: Checkpoint, engine: Engine, folder: Path, shard_cache: FileCache) -> None:
    """Brings the verified objects that this rank needs to `folder`; those that an attempt before has brought stay."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {
        folder / f"{kind}-{number:05d}.safetensors": getattr(checkpoint.shards[number], kind)
        for number in _needed(store, checkpoint, engine)
        for kind in Shard.model_fields
    }
    for path in folder.iterdir():
        if path not in wanted or file_sha256(path) != wanted[path].sha256:
            path.unlink()
    for path, ref in wanted.items():
        if path.exists():
            continue
        try:
            _fetch(store, ref, path, shard_cache)
        except CorruptError:  # on the way, perhaps: large objects come in ranges, which carry no checksum
            _fetch(store, ref, path, shard_cache)


def _fetch(store: ObjectStore, ref: ObjectRef, path: Path, shard_cache: FileCache) -> None:
    """On a full disk, shards make room, as soon as others have closed their maps: they can be had again."""
    for pause in (*PAUSES, None):
        try:
            return manifest.download(store, ref, path)
        except (OSError, StoreError) as error:
            if pause is None or full_disk(error) is None:
                raise
        shard_cache.make_room(ref.size)
        time.sleep(pause)


def _needed(store: ObjectStore, checkpoint: Checkpoint, engine: Engine) -> list[int]:
    """Shards that hold some of this rank's fragments: its own if the layout is the same."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if (checkpoint.ranks, checkpoint.zero_stage) == (ranks, engine.config.zero_stage):
        return [rank]
    mine = {f.name: (f.start, f.start + len(f.master)) for f in engine.fragments}
    needed = []
    for number, shard in enumerate(checkpoint.shards):
        length = int.from_bytes(store.read(shard.weights.key, 0, 8), "little")
        if length > shard.weights.size:
            raise CorruptError(f"{store.url}/{shard.weights.key} has no safetensors header; use an older checkpoint")
        for key, count in fragments_in(store.read(shard.weights.key, 8, length)).items():
            name, _, start = key.rpartition("@")
            first, last = mine.get(name, (0, 0))
            if first < int(start) + count and int(start) < last:
                needed.append(number)
                break
    return needed


def _set_aside(store: ObjectStore, run: str, steps: Iterable[int]) -> None:
    """Moves bad manifests out of the way, so that the steps can be committed anew."""
    for step in steps:
        key, bad = checkpoint_key(run, step), f"runs/{run}/bad/{step:09d}.json"
        if store.head(key) is not None:
            store.write(bad, store.read(key))
            store.delete([key])
            log.warning("checkpoint %d is set aside as %s/%s", step, store.url, bad)
