"""Grids of pictures while training: every rank draws its share of the same pictures, whatever the ZeRO stage."""

from __future__ import annotations

import io
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from safetensors.torch import load_file, save_file

from starflow.encoders import load_vae
from starflow.errors import ConfigError
from starflow.model import STARFlow
from starflow.objectstore import open_store
from starflow.reader import SnapshotReader
from starflow.snapshots import load_snapshot
from tests.training.run_helpers import train
from tests.training.small_snapshot import VAE, publish_samples
from training.architecture import architecture
from training.conditions import make_conditioner
from training.ema import EMA
from training.engine import Engine
from training.metrics import MetricsLog, read_metrics
from training.record import list_samples
from training.run_commands import describe_run
from training.samples import SampleGrids, earlier_samples, vae_for_samples


def work(rank, config, folder):
    """One rank: a step, so that average and weights differ, then a grid."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(config.ranks)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=config.ranks)
    torch.manual_seed(7)
    flow = architecture(config)
    engine = Engine(STARFlow(flow), config)
    ema = EMA(engine.fragments)
    before = {name: average.clone() for name, average in ema.whole(engine.shapes, engine.device, lambda: None)}
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(config.global_batch_size, 4, 8, 8, generator=generator).chunk(config.ranks)[rank]
    engine.backward([(latents, torch.zeros(config.per_rank, 6, 24))])
    engine.step(1e-2)
    ema.update(0.5)
    whole = dict(ema.whole(engine.shapes, engine.device, lambda: None))
    store = open_store(config.store)
    reader = SnapshotReader(store, load_snapshot(store), config.cache / "snapshots", config.held_out)
    conditioner = make_conditioner(config, flow, reader.text, "cpu")
    beats = []
    grids = SampleGrids(config, store, engine, ema, reader, conditioner)
    picture = grids.draw(3, lambda: beats.append(1))
    grids.close()
    assert (picture is None) == (rank > 0)
    assert beats
    if rank == 0:
        save_file({**{f"before/{k}": v for k, v in before.items()}, **whole}, folder / "whole.safetensors")
    dist.destroy_process_group()


def drawn(make_config, store, tmp_path, ranks, stage):
    """Pixels of the grid and the whole averaged weights."""
    name = f"{ranks}-{stage}"
    config = make_config(run=name, ranks=ranks, zero_stage=stage, sample_every=1, sample_count=3)
    (tmp_path / name).mkdir()
    mp.spawn(work, (config, tmp_path / name), nprocs=ranks)
    assert list_samples(store, name) == [f"runs/{name}/samples/000000003.png"]
    image = Image.open(io.BytesIO(store.read(list_samples(store, name)[0])))
    return np.asarray(image).astype(int), load_file(tmp_path / name / "whole.safetensors")


@pytest.fixture
def store(tmp_path):
    """A snapshot whose latents a VAE that is there can decode."""
    opened = open_store(str(tmp_path / "store"))
    publish_samples(opened, vae=load_vae("emoji").identity)
    return opened


def test_ranks_draw_the_same_pictures_as_one(make_config, store, tmp_path):
    one, weights = drawn(make_config, store, tmp_path, 1, 1)
    two, averages = drawn(make_config, store, tmp_path, 2, 3)
    assert one.std() > 5  # something is in it
    assert np.abs(one - two).mean() < 1
    moved = [
        name for name in weights if not name.startswith("before/") and weights[name].ne(weights[f"before/{name}"]).any()
    ]
    assert moved
    for name in weights:
        torch.testing.assert_close(averages[name], weights[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_other_stages_draw_the_same(make_config, store, tmp_path, stage):
    one, _ = drawn(make_config, store, tmp_path, 1, 1)
    two, _ = drawn(make_config, store, tmp_path, 2, stage)
    assert np.abs(one - two).mean() < 1


@pytest.mark.slow
def test_the_command_draws_on_time_under_zero_3(make_config, store, tmp_path):
    config = make_config(steps=5, zero_stage=3, sample_every=2, sample_count=3)
    assert train(config, tmp_path) == 0
    shown = describe_run(store.url, config.run)
    assert shown["sample_grids"] == [f"runs/test/samples/{step:09d}.png" for step in (2, 4, 5)]
    logged = read_metrics(store.read("runs/test/metrics.jsonl"))
    assert [line["step"] for line in logged if "sample_seconds" in line] == [2, 4, 5]
    assert Image.open(io.BytesIO(store.read(shown["sample_grids"][-1]))).width > 3 * 96


def test_another_vae_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"VAE emoji with weights 000000000000, emoji here has"):
        vae_for_samples(VAE.model_copy(update={"name": "emoji"}), "cpu")


def test_a_resumed_tensorboard_shows_earlier_pictures_once(make_config, store):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for step in (2, 4, 6):
        buffer = io.BytesIO()
        Image.new("RGB", (4, 4), (step, 0, 0)).save(buffer, "PNG")
        store.write(f"runs/test/samples/{step:09d}.png", buffer.getvalue())
    config = make_config()
    log = MetricsLog(config, b'{"step": 4, "loss": 1.0}\n', earlier_samples(store, "test", 4))
    log.picture(6, Image.new("RGB", (4, 4)))
    log.close()
    events = EventAccumulator(str(config.folder / "tensorboard"))
    events.Reload()
    assert [image.step for image in events.Images("samples")] == [2, 4, 6]
    assert [value.step for value in events.Scalars("train/loss")] == [4]
