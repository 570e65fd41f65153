"""Fine-tuning a decoder: it learns, goes on exactly after a kill, and refuses what does not belong together."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pytest
import torch
from typer.testing import CliRunner

from infra.demo.emoji import write_pictures
from starflow import manifest
from starflow.cache import FileCache
from starflow.cli import app
from starflow.decoders import list_decoders
from starflow.encoders import load_vae
from starflow.errors import AlreadyExistsError, ConfigError, CorruptError, StarflowError
from starflow.images import decode_image, fit
from starflow.objectstore import open_store
from starflow.parts import part_from_arrays
from starflow.snapshots import publish
from tests.starflow.fetched import write_batch
from training.decoder import DecoderConfig, finetune
from training.decoder_pictures import SnapshotPictures, encode_pictures
from training.decoder_state import list_progress
from training.vae import unit

torch.set_num_threads(1)

#: Small, and noisy enough for the VAE's own decoder to be far from the best.
SMALL = {
    "resolution": 16,
    "latent_noise": 0.8,
    "steps": 8,
    "batch_size": 8,
    "learning_rate": 1e-3,
    "adversarial_start": 4,
    "discriminator_width": 8,
    "discriminator_layers": 2,
    "held_out": 0.1,
    "validate_every": 100,
    "checkpoint_every": 2,
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder, limit=48, size=32)
    return folder


@pytest.fixture
def config(pictures, tmp_path):
    def make(**changes):
        values = {"store": str(tmp_path / "store"), "name": "d", "images": pictures, "cache": tmp_path / "cache"}
        return DecoderConfig(**values | SMALL | changes)

    return make


class Killed(Exception):
    """Stands for SIGKILL: nothing after it is done."""


def killed_after(step):
    def on_progress(done, losses, quality):
        if done == step:
            raise Killed

    return on_progress


def test_it_decodes_noisy_latents_better_than_the_plain_decoder(config):
    seen = []
    settings = config(steps=30, adversarial_weight=0, validate_every=10, checkpoint_every=100)
    decoder = finetune(settings, lambda step, losses, quality: seen.append((losses, quality)))
    qualities = [quality for _, quality in seen if quality is not None]
    assert [quality.plain for quality in qualities] == [qualities[0].plain] * 3
    assert decoder.quality == qualities[-1]
    assert decoder.quality.tuned > decoder.quality.plain + 0.5
    first, last = (sum(losses.total for losses, _ in part) for part in (seen[:5], seen[-5:]))
    assert last < 0.9 * first
    assert seen[0][0].adversarial is seen[0][0].discriminator is seen[0][0].perceptual is None
    assert decoder.vae == load_vae("emoji").identity
    assert (decoder.latent_noise, decoder.steps) == (0.8, 30)


def test_a_killed_fine_tuning_goes_on_to_the_same_weights(config, tmp_path):
    whole = finetune(config(store=str(tmp_path / "whole")))
    settings, seen = config(), []
    for step in (5, 7):
        with pytest.raises(Killed):
            finetune(settings, killed_after(step))
    # Both are damaged; when the older one is restored it serves.
    store = open_store(settings.store)
    both = [manifest.load(store, key, "decoder-progress", 1) for key in list_progress(store, "d")]
    newest, data = both[0], [store.read(progress["tensors"]["key"]) for progress in both]
    for progress in both:
        store.write(progress["tensors"]["key"], b"damaged")
    with pytest.raises(CorruptError, match=r"none of 2 is whole \(.* is corrupt.*restore"):
        finetune(settings)
    store.write(both[1]["tensors"]["key"], data[1])  # as the error asks: nothing was begun anew meanwhile
    decoder = finetune(settings, lambda step, losses, quality: seen.append(step))
    assert newest["step"] == 6
    assert seen == [5, 6, 7, 8]
    assert decoder.weights.sha256 == whole.weights.sha256
    assert decoder.quality == whole.quality
    assert sorted(info.key for info in store.list("decoders/")) == [
        "decoders/d/decoder.json",
        "decoders/d/weights.safetensors",
    ]
    assert finetune(settings, killed_after(8)) == decoder  # finished: nothing is left to do


def test_sigkill_of_the_command_costs_no_progress(config, pictures, tmp_path):
    settings = config(steps=400, checkpoint_every=10)
    file = tmp_path / "config.json"  # which is YAML, too
    file.write_text(settings.model_dump_json(exclude={"vae"}))
    command = [sys.executable, "-m", "starflow.cli", "finetune-decoder", "--config", str(file), "--threads", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        store, deadline = open_store(settings.store), time.monotonic() + 300
        while not list_progress(store, "d"):
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    seen = []
    with pytest.raises(Killed):
        finetune(settings, lambda step, losses, quality: (seen.append(step), killed_after(seen[0])(step, None, None)))
    assert seen[0] > 10
    assert (seen[0] - 1) % 10 == 0


def test_the_discriminator_plays_from_its_step_on(config, tmp_path):
    losses = {}
    played = finetune(config(steps=6), lambda step, found, quality: losses.update({step: found}))
    assert [losses[step].adversarial is None for step in range(1, 7)] == [True] * 4 + [False] * 2
    assert all(found.discriminator > 0 for found in losses.values())
    assert losses[6].discriminator < losses[1].discriminator
    assert losses[5].total != losses[5].reconstruction
    calm = finetune(config(steps=6, adversarial_start=6, store=str(tmp_path / "calm")))
    assert calm.weights.sha256 != played.weights.sha256


def test_lpips_takes_part_where_its_weights_are_given(config, tmp_path, monkeypatch):
    class Mean(torch.nn.Module):
        SMALLEST = 16

        def __init__(self, state):
            super().__init__()

        def forward(self, decoded, target):
            return (decoded - target).mean((1, 2, 3)).square()

    monkeypatch.setattr("training.decoder.read_perceptual", lambda files: files)
    monkeypatch.setattr("training.decoder.Perceptual", Mean)
    losses = []
    settings = config(steps=1, perceptual_files=["vgg16.pth"], perceptual_weight=2.0)
    decoder = finetune(settings, lambda step, found, quality: losses.append(found))
    assert losses[0].total == pytest.approx(losses[0].reconstruction + 2 * losses[0].perceptual)
    assert decoder.quality.tuned_lpips is not None
    assert decoder.quality.plain_lpips is not None


def test_another_configuration_or_other_pictures_do_not_go_on(config, tmp_path):
    with pytest.raises(Killed):
        finetune(config(), killed_after(3))
    with pytest.raises(ConfigError, match=r"'d' was started with latent_noise=0\.8, the configuration says .*=0\.3"):
        finetune(config(latent_noise=0.3))
    write_pictures(tmp_path / "others", limit=24, size=32)
    with pytest.raises(ConfigError, match=r"was started with 4\d \+ \d pictures .*, these are 2\d \+"):
        finetune(config(images=tmp_path / "others"))
    finetune(config(checkpoint_every=3))
    with pytest.raises(ConfigError, match=r"seed=0"):
        finetune(config(seed=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 17}, r"resolution 17 .* downsampling 2"),
        ({"resolution": 8}, r"side of 8 pixels .* needs 12; set discriminator_layers lower"),
        ({"resolution": 8, "adversarial_weight": 0, "perceptual_files": ["x"]}, r"too small for LPIPS, which needs 16"),
        ({"perceptual_files": ["none.pth"]}, r"perceptual weights none\.pth cannot be read"),
        ({"images": None}, r"no snapshot"),
    ],
)
def test_what_cannot_be_is_one_sentence(config, changes, message):
    with pytest.raises(StarflowError, match=message):
        finetune(config(**changes))


def test_some_pixel_loss_is_needed():
    with pytest.raises(ValueError, match="l1_weight and l2_weight are both 0"):
        DecoderConfig(store="s", name="n", l1_weight=0, l2_weight=0)


def test_the_command_says_that_lpips_is_off_and_prints_the_decoder(config):
    settings = config(steps=2, validate_every=1)
    shared = settings.model_dump(mode="json", exclude={"vae", "perceptual_files"})
    arguments = ["finetune-decoder", "--json", *(f"{key}={value}" for key, value in shared.items())]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "without the perceptual loss" in result.stderr
    assert "step 2/2" in result.stderr
    assert json.loads(result.stdout)["quality"]["pictures"] > 0
    assert [decoder.name for decoder in list_decoders(open_store(settings.store))] == ["d"]


@pytest.fixture(scope="module")
def snapshot(pictures, tmp_path_factory):
    """A store with a snapshot of two shapes, and the original bytes of all its pictures but the first."""
    store = open_store(str(tmp_path_factory.mktemp("snapshot")))
    vae = load_vae("emoji")
    data = [file.read_bytes() for file in sorted(pictures.rglob("*.png"))]
    ids = [hashlib.sha256(picture).hexdigest() for picture in data]
    parts = []
    for rows, (height, width) in ((slice(0, 32), (16, 16)), (slice(32, None), (16, 24))):
        pixels = np.stack([fit(decode_image(picture), height, width) for picture in data[rows]])
        latents = encode_pictures(vae, torch.from_numpy(pixels).permute(0, 3, 1, 2), "cpu")
        table = pa.table({"id": ids[rows], "url": [f"http://x/{id}" for id in ids[rows]]})
        parts.append(part_from_arrays(store, vae.identity, latents.mean.numpy(), latents.std.numpy(), table))
    write_batch(store, "0", dict(zip(ids[1:], data[1:], strict=True)))
    return store, publish(store, parent=None, parts=parts, image_size=16, attribution="by OpenMoji")


def test_a_snapshots_latents_meet_their_original_pictures(snapshot, tmp_path):
    store, published = snapshot
    source = SnapshotPictures(store, published, FileCache(tmp_path), 0.1, batch_size=8, seed=0)
    assert source.smallest == 16
    vae, shapes = load_vae("emoji"), set()
    for step in range(6):
        batch = source.training(step)
        shapes.add(tuple(batch.pixels.shape[2:]))
        mean, _ = vae.encode(unit(batch.pixels))
        assert (mean - batch.mean).abs().max() < 0.01  # stored in half precision
    assert shapes == {(16, 16), (16, 24)}
    held_out = sum(len(batch.pixels) for batch in source.held_out(1000))
    trained = sum(len(ordinals) for ordinals, _ in source._sides["training"].values())
    assert held_out + trained == published.counts.total - 1
    assert sum(len(batch.pixels) for batch in source.held_out(2)) in (2, 3)


def test_a_decoder_learns_from_a_snapshot(snapshot, config):
    store, published = snapshot
    decoder = finetune(config(store=store.url, images=None, steps=3))
    assert decoder.attribution == "by OpenMoji"
    assert decoder.config["snapshot"] == published.id
    assert decoder.quality.pictures > 0
    with pytest.raises(AlreadyExistsError, match="exists with other content"):
        manifest.commit(store, "decoders/d/decoder.json", "decoder", 1, {})


def test_another_vae_than_the_snapshots_is_refused(snapshot, config, tmp_path):
    store, published = snapshot
    other = load_vae("emoji").module
    with torch.no_grad():
        other.decoder.conv_out.bias += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match=rf"other has weights .*{published.id} was made by emoji"):
        finetune(config(store=store.url, name="e", images=None, vae=str(tmp_path / "other")))


def test_a_snapshot_without_original_bytes_says_what_to_do(snapshot, config, tmp_path):
    store, _ = snapshot
    bare = open_store(str(tmp_path / "bare"))
    for info in store.list():
        if not info.key.startswith(("crawl/", "decoders/")):
            bare.write(info.key, store.read(info.key))
    with pytest.raises(StarflowError, match=r"original bytes of no training picture .* set images to a folder"):
        finetune(config(store=bare.url, images=None))
