"""A small published snapshot that the tiny preset can train on, and the manifest of a checkpoint of such a run."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa

from starflow import manifest
from starflow.checkpoints import KIND, VERSION, Checkpoint, Progress, TrainedInfo, checkpoint_key
from starflow.encoders import TextIdentity, VAEIdentity
from starflow.parts import LayerPlan, part_from_arrays
from starflow.snapshots import load_snapshot, publish

VAE = VAEIdentity(name="test", sha256="0" * 64, scaling_factor=1.0, channels=4, downsampling=2)
TEXT = TextIdentity(name="test-text", sha256="1" * 64)
TEXT_SHAPE = (6, 24)
COUNT = 96


def publish_samples(store, count=COUNT, seed=0, vae=VAE):
    """Publishes `count` smooth random latents with captions and text states; returns the snapshot."""
    random = np.random.default_rng(seed)
    colour = random.normal(size=(count, 4, 1, 1))
    mean = (0.5 * colour + 0.2 * random.normal(size=(count, 4, 8, 8))).astype(np.float16)
    std = np.full_like(mean, 0.05)
    states = np.repeat(colour.reshape(count, 1, 4), 6, axis=2).repeat(6, axis=1).astype(np.float16)
    ids = [hashlib.sha256(f"{seed}/{row}".encode()).hexdigest() for row in range(count)]
    table = pa.table({"id": ids, "url": [f"http://x/{row}" for row in range(count)]})
    layer = LayerPlan(origin="alt-text", version="1", text=TEXT)
    captions = [f"picture {row}" for row in range(count)]
    part = part_from_arrays(store, vae, mean, std, table, [(layer, captions)], [states])
    return publish(store, parent=None, parts=[part], image_size=16, attribution="made up")


def publish_more(store):
    """Publishes the newest snapshot once more, with a part of two samples on top; returns the snapshot."""
    parent = load_snapshot(store)
    latents = np.ones((2, 4, 8, 8), np.float16)
    table = pa.table({"id": [f"{row:064x}" for row in range(2)], "url": [""] * 2})
    part = part_from_arrays(store, VAE, latents, latents, table, [])
    return publish(store, parent=parent, parts=[*parent.parts, part], image_size=16)


def save_checkpoint(store, config, step, held_out_bits=None):
    """Commits a checkpoint without shards, as a run of `config` would."""
    data = manifest.put(store, f"runs/{config.run}/shards/{step:09d}-x/metrics.jsonl", b"")
    trained = TrainedInfo(
        run=config.run, step=step, samples=8 * step, snapshot=config.snapshot, vae=VAE, text_encoder=TEXT.name,
        latent_noise=0.1, held_out=0.0,
    )  # fmt: skip
    checkpoint = Checkpoint(
        run=config.run, step=step, created="2026-01-01T00:00:00+00:00", code="test", ranks=1, zero_stage=2, shards=(),
        parameters={}, model={}, trained=trained, config=config.model_dump(mode="json"), metrics=data,
        progress=Progress(samples=8 * step, optimizer_steps=step, held_out_bits=held_out_bits),
    )  # fmt: skip
    manifest.commit(store, checkpoint_key(config.run, step), KIND, VERSION, checkpoint.model_dump(mode="json"))
