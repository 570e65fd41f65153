"""A small published snapshot, and what a run of the tiny preset on it needs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from starflow.objectstore import open_store
from tests.training.small_snapshot import TEXT, TEXT_SHAPE, publish_samples
from training import silence
from training.config import TrainConfig


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def process_group(tmp_path_factory):
    """A group of this process alone, one for the whole session: DeepSpeed remembers the first it meets."""
    file = tmp_path_factory.mktemp("rendezvous") / "store"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def one_rank(process_group, monkeypatch):
    """This process is the only rank of a run."""
    monkeypatch.setenv("LOCAL_RANK", "0")  # what torchrun sets


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


@pytest.fixture
def clock(monkeypatch):
    """The clock by which silence is told, which stands still until the test moves it: clock.now, in seconds."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(silence, "time", clock)
    return clock
