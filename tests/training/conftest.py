"""A small published snapshot, and what a run of the tiny preset on it needs."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pytest
import torch

from starflow.encoders import TextIdentity, VAEIdentity
from starflow.objectstore import open_store
from starflow.parts import LayerPlan, part_from_arrays
from starflow.snapshots import publish
from training.config import TrainConfig

VAE = VAEIdentity(name="test", sha256="0" * 64, scaling_factor=1.0, channels=4, downsampling=2)
TEXT = TextIdentity(name="test-text", sha256="1" * 64)
TEXT_SHAPE = (6, 24)
COUNT = 96


def publish_samples(store, count=COUNT, seed=0):
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
    part = part_from_arrays(store, VAE, mean, std, table, [(layer, captions)], [states])
    return publish(store, parent=None, parts=[part], image_size=16, attribution="made up")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def store(tmp_path):
    """A local store with a snapshot."""
    opened = open_store(str(tmp_path / "store"))
    publish_samples(opened)
    return opened


@pytest.fixture
def make_config(tmp_path, store):
    """TrainConfig for the tiny preset on that snapshot; keyword arguments override."""
    cache = tmp_path / "cache"
    null = cache / "null-captions" / f"{TEXT.sha256}-{TEXT_SHAPE[0]}.npy"
    null.parent.mkdir(parents=True)
    np.save(null, np.zeros(TEXT_SHAPE, np.float32))

    def make(**values):
        defaults = {
            "store": store.url, "run": "test", "preset": "tiny", "text_encoder": TEXT.name, "steps": 6, "ranks": 2,
            "global_batch_size": 8, "checkpoint_every": 2, "validation_every": 3, "validation_samples": 8,
            "held_out": 0.1, "precision": "float32", "cache": cache, "hang_timeout": 60.0, "lease_seconds": 5.0,
            "model": {"width": 64, "layers": [1, 1]},
        }  # fmt: skip
        return TrainConfig.model_validate({**defaults, **values})

    return make
