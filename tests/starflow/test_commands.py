"""The commands, on a small random flow with the shipped VAE and text encoder."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from starflow.checkpoints import TrainedInfo
from starflow.encoders import load_vae
from starflow.errors import StarflowError
from starflow.model import FlowConfig
from tests.starflow.flows import random_flow

VECTORS = Path(__file__).parent.parent / "vectors"
EMOJI = FlowConfig(64, (1, 1), patch=2, grid=(16, 16), text_length=16, text_width=384)


def starflow(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "starflow.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported checkpoint."""
    folder = tmp_path_factory.mktemp("exported")
    trained = TrainedInfo(
        run="r",
        step=1,
        samples=1,
        snapshot="s",
        vae=load_vae("emoji").identity,
        text_encoder="minilm",
        latent_noise=0.2,
        held_out=0,
    )
    save_file(random_flow(EMOJI, std=0.05).state_dict(), folder / "model.safetensors")
    described = {"model": EMOJI.to_dict(), "trained": trained.model_dump()}
    (folder / "config.json").write_text(json.dumps(described))
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for seed in range(3):
        pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}.png")
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs a command in this process, which has torch and the encoders loaded; returns (exit code, stdout)."""
    from starflow.cli import app

    torch.set_num_threads(1)

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["starflow", *map(str, arguments)])
        try:
            app()
        except SystemExit as exit:
            return int(exit.code or 0), capsys.readouterr().out
        return 0, capsys.readouterr().out

    return call


def test_verify_prints_json_and_succeeds() -> None:
    done = starflow("verify", VECTORS / "tiny_wide")
    answer = json.loads(done.stdout)
    assert answer["passed"]
    assert max(answer["errors"].values()) < answer["limit"] == 1e-4


def test_verify_fails_on_other_numbers(tmp_path: Path, run) -> None:
    from safetensors.torch import load_file

    for suffix in (".json", ".checkpoint.pth", ".vectors.safetensors"):
        (tmp_path / f"v{suffix}").write_bytes((VECTORS / f"tiny_wide{suffix}").read_bytes())
    vectors = load_file(tmp_path / "v.vectors.safetensors")
    vectors["loss"] = vectors["loss"] + torch.nan
    save_file(vectors, tmp_path / "v.vectors.safetensors")
    code, out = run("verify", tmp_path / "v")
    assert code == 1
    assert json.loads(out)["errors"]["loss"] == "infinite"


def test_errors_are_one_sentence() -> None:
    done = starflow("verify", "/nowhere/v", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot read /nowhere/v.json")
    assert "Traceback" not in done.stderr


def test_model_describe_and_list(run) -> None:
    code, out = run("model", "describe", "t2i-256", "--json", "--ranks", 4)
    described = json.loads(out)
    assert code == 0
    assert described["parameters"] == 3858281544
    assert described["training_bytes_per_rank"]["ranks"] == 4
    code, out = run("model", "describe", "tiny")
    assert "zero3 on 8 ranks" in out
    code, out = run("model", "list", "--json")
    assert json.loads(out)["emoji"] == 4551504


def test_import_export_round_trip(tmp_path: Path, run) -> None:
    weights = VECTORS / "tiny_wide.checkpoint.pth"
    assert run("import", weights, tmp_path / "m", "--config", VECTORS / "tiny_wide.json")[0] == 0
    assert run("export", tmp_path / "m", tmp_path / "back.pth")[0] == 0
    before, after = (torch.load(path, weights_only=True) for path in (weights, tmp_path / "back.pth"))
    assert all(torch.equal(before[key], after[key]) for key in after)


def test_sample_writes_the_same_picture_twice(folder: Path, tmp_path: Path, run) -> None:
    files = []
    for name in ("a", "b"):
        files.append(tmp_path / f"{name}.png")
        code, out = run(
            "sample",
            "a red heart",
            "a cat",
            "-c",
            folder,
            "-o",
            files[-1],
            "--seed",
            4,
            "--folder",
            tmp_path / name,
            "--json",
        )
        assert code == 0
        assert len(json.loads(out)["files"]) == 2
    assert files[0].read_bytes() == files[1].read_bytes()
    assert Image.open(tmp_path / "a" / "0000.png").size == (32, 32)
    code, _ = run("sample", "a cat", "-c", folder, "-o", files[0], "--aspect", "2:1", "--method", "sequential", "-n", 1)
    assert code == 0


def test_score_with_maps(folder: Path, pictures: Path, tmp_path: Path, run) -> None:
    code, out = run("score", pictures, "-c", folder, "--caption", "a cat", "--json", "--maps", tmp_path / "maps")
    rows = json.loads(out)
    assert code == 0
    assert [Path(row["image"]).name for row in rows] == ["0.png", "1.png", "2.png"]
    assert all(row["explained"] == row["nats"] - row["nats_without_caption"] for row in rows)
    assert len(list((tmp_path / "maps").glob("*-explained.png"))) == 3


def test_encode_and_decode_are_inverse(folder: Path, pictures: Path, tmp_path: Path, run) -> None:
    from starflow.generate import Generator

    noise = tmp_path / "noise.safetensors"
    assert run("encode", pictures, "-c", folder, "-o", noise, "--caption", "a cat")[0] == 0
    code, out = run("decode", noise, "-c", folder, "--folder", tmp_path / "out", "--json")
    assert code == 0
    generator = Generator.open(str(folder))
    images = [Image.open(path) for path in sorted(pictures.iterdir())]
    expected = generator.pictures(generator.latents(images, seed=None))
    for file, image in zip(json.loads(out)["files"], expected, strict=True):
        assert np.abs(np.asarray(Image.open(file), int) - np.asarray(image, int)).max() <= 1


def test_noise_of_another_shape_is_refused(folder: Path, tmp_path: Path, run) -> None:
    save_file({"noise": torch.zeros(4, 16)}, tmp_path / "flat.safetensors")
    with pytest.raises(StarflowError, match=r"flat.safetensors holds noise of shape \(4, 16\).*\(B, C, H, W\)"):
        run("decode", tmp_path / "flat.safetensors", "-c", folder, "--folder", tmp_path)


def test_pictures_of_several_shapes_are_scored_but_not_encoded_together(
    folder: Path, pictures: Path, tmp_path: Path, run
) -> None:
    Image.new("RGB", (60, 20), "white").save(tmp_path / "wide.png")
    both = (pictures / "0.png", tmp_path / "wide.png")
    code, out = run("score", *both, "-c", folder, "--json")
    assert code == 0
    assert len(json.loads(out)) == 2
    with pytest.raises(StarflowError, match=r"wide.png of 60 x 20 pixels .*0.png of 32 x 32 pixels; encode"):
        run("encode", *both, "-c", folder, "-o", tmp_path / "noise.safetensors")


def test_interpolate_inpaint_typicality(folder: Path, pictures: Path, tmp_path: Path, run) -> None:
    first, last = pictures / "0.png", pictures / "1.png"
    assert run("interpolate", first, last, "-c", folder, "-o", tmp_path / "path.png", "--steps", 3)[0] == 0
    mask = Image.new("L", (32, 32))
    mask.paste(255, (16, 16, 32, 32))
    mask.save(tmp_path / "mask.png")
    out = tmp_path / "filled.png"
    assert run("inpaint", first, tmp_path / "mask.png", "-c", folder, "-o", out, "--rounds", 1)[0] == 0
    Image.new("RGB", (32, 32), "white").save(tmp_path / "flat.png")
    code, answer = run(
        "typicality",
        tmp_path / "flat.png",
        "-c",
        folder,
        "--reference",
        pictures,
        "--json",
        "--level",
        0.3,
        "-o",
        tmp_path / "new" / "table.csv",
    )
    assert len((tmp_path / "new" / "table.csv").read_text().splitlines()) == 2
    assert code == 0
    (judged,) = json.loads(answer)
    assert judged["outlier"]
    assert judged["id"] == hashlib.sha256((tmp_path / "flat.png").read_bytes()).hexdigest()
    assert Image.open(tmp_path / "path.png").size[0] > 3 * 32
    assert out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "x", "-c", "nothing"], "STORE/RUN@STEP"),
        (["score", "/nowhere.png", "-c", "FOLDER"], "/nowhere.png cannot be read"),
        (["sample", "x", "-c", "FOLDER", "--aspect", "wide"], "'wide' is not width:height"),
        (["sample", "x", "-c", "FOLDER", "--device", "foo"], "--device foo does not exist here; choose one of cpu"),
        (["sample", "x", "-c", "FOLDER", "--device", "cuda:99"], "--device cuda:99 does not exist here"),
        (["score", "PICTURES", "-c", "FOLDER", "--caption", "a", "--caption", "b"], "2 captions for 3 pictures"),
    ],
)
def test_misuse_is_explained(arguments: list[str], message: str, folder: Path, pictures: Path, run) -> None:
    filled = [{"FOLDER": str(folder), "PICTURES": str(pictures)}.get(word, word) for word in arguments]
    with pytest.raises(StarflowError, match=message):
        run(*filled)
