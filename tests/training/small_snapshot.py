"""A small published snapshot that the tiny preset can train on."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa

from starflow.encoders import TextIdentity, VAEIdentity
from starflow.parts import LayerPlan, part_from_arrays
from starflow.snapshots import publish

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
