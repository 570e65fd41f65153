import json

import pytest
import torch
from typer.testing import CliRunner

from infra.demo.emoji import write_pictures
from starflow.cli import app
from starflow.encoders import load_vae
from starflow.errors import ConfigError
from training.vae import VAETrainConfig, build, learning_rate, load_folder, loss_of, psnr, train

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder, limit=48)
    return folder


def config(pictures, out, **values):
    small = {"resolution": 16, "widths": (8, 16), "batch_size": 8, "steps": 30, "validate_every": 10}
    return VAETrainConfig(images=pictures, out=out, **small | values)


def test_training_improves_and_writes_what_load_vae_reads(pictures, tmp_path):
    reports = []
    report = train(config(pictures, tmp_path), lambda step, loss, report: reports.append(report))
    measured = [item for item in reports if item is not None]
    assert [item.step for item in measured] == [10, 20, 30]
    assert measured[-1].psnr > measured[0].psnr + 1
    vae = load_vae(str(tmp_path))
    assert vae.identity.scaling_factor == pytest.approx(report.scaling_factor)
    train_images, held_out = load_folder(pictures, 16, 0.05, 0)
    assert psnr(vae.module, held_out) == pytest.approx(report.psnr, abs=0.01)
    mean, _ = vae.encode(train_images.float() / 127.5 - 1)
    assert mean.std().item() == pytest.approx(1, abs=0.05)


def test_the_same_seed_gives_the_same_weights(pictures, tmp_path):
    for name in ("a", "b"):
        train(config(pictures, tmp_path / name, steps=3), lambda *_: None)
    assert load_vae(str(tmp_path / "a")).identity.sha256 == load_vae(str(tmp_path / "b")).identity.sha256


def test_variants_in_one_folder_stay_on_one_side(tmp_path):
    from PIL import Image

    for group in range(10):
        (tmp_path / str(group)).mkdir()
        for variant in range(3):
            Image.new("RGB", (8, 8), (group * 20, 0, 0)).save(tmp_path / str(group) / f"{variant}.png")
    train_images, held_out = load_folder(tmp_path, 8, held_out=0.2, seed=1)
    assert (len(train_images), len(held_out)) == (24, 6)
    assert not {int(x[0, 0, 0]) for x in train_images} & {int(x[0, 0, 0]) for x in held_out}


def test_a_flat_folder_is_split_by_picture(tmp_path):
    from PIL import Image

    for index in range(4):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{index}.png")
    train_images, held_out = load_folder(tmp_path, 8, held_out=0.25, seed=0)
    assert (len(train_images), len(held_out)) == (3, 1)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds 0 pictures"):
        load_folder(tmp_path, 8, 0.1, 0)


def test_every_weight_gets_a_gradient(pictures, tmp_path):
    settings = config(pictures, tmp_path, precision="float32")
    vae = build(settings)
    loss_of(vae, torch.rand(2, 3, 16, 16) * 2 - 1, settings, torch.Generator().manual_seed(0)).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in vae.parameters())


def test_learning_rate_rises_then_falls_to_zero():
    rates = [learning_rate(step, steps=100, peak=1.0) for step in range(100)]
    assert rates[0] == 0.5
    assert max(rates) == rates[1] == 1.0
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[-1] < 0.001


def test_the_command_prints_its_report(pictures, tmp_path):
    arguments = ["train-vae", "--images", str(pictures), "--out", str(tmp_path), "--steps", "2", "--json"]
    arguments += ["resolution=16", "widths=[8,16]", "batch_size=4", "validate_every=1"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["step"] in (1, 2)
    assert report["psnr"] > 0
    assert report["out"] == str(tmp_path)
    assert "step 2/2" in result.stderr
