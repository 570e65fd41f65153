"""Every file of examples/ does what its first lines say, on small data and a random flow."""

from __future__ import annotations

import csv
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from pipelines.config import RefreshConfig
from starflow.checkpoints import TrainedInfo, list_steps
from starflow.config import load_config
from starflow.encoders import load_vae
from starflow.model import FlowConfig
from starflow.objectstore import open_store
from starflow.snapshots import load_snapshot
from tests.starflow.flows import random_flow
from training.config import TrainConfig

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
FLOW = FlowConfig(64, (1, 1), patch=2, grid=(16, 16), text_length=16, text_width=384)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a script in this process, which has its imports already; returns what it printed."""

    def call(script: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out

    return call


def command(*arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "starflow.cli", *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported checkpoint with random weights."""
    folder = tmp_path_factory.mktemp("exported")
    vae = load_vae("emoji").identity
    trained = TrainedInfo(
        run="r", step=1, samples=1, snapshot="s", vae=vae, text_encoder="minilm", latent_noise=0.2, held_out=0
    )
    save_file(random_flow(FLOW, std=0.05).state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model": FLOW.to_dict(), "trained": trained.model_dump()}))
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve smooth pictures, each with a caption."""
    folder = tmp_path_factory.mktemp("pictures")
    for seed in range(12):
        coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((40, 40)).save(folder / f"{seed:02d}.png")
        (folder / f"{seed:02d}.txt").write_text(f"smooth colours, number {seed}")
    return folder


def test_outliers_are_listed_first(run: Callable[..., str], checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    suspects = tmp_path / "suspects"
    suspects.mkdir()
    for name in ("00", "01"):
        (suspects / f"{name}.png").write_bytes((pictures / f"{name}.png").read_bytes())
    Image.new("RGB", (40, 40), "white").save(suspects / "blank.png")
    out = tmp_path / "outliers.csv"
    run("find_outliers.py", suspects, "--reference", pictures, "--checkpoint", checkpoint, "--out", out)
    rows = list(csv.DictReader(out.open()))
    assert rows[0]["picture"] == "blank.png"
    assert [float(row["p_value"]) for row in rows] == sorted(float(row["p_value"]) for row in rows)


def test_a_picture_is_drawn_and_changed_in_the_middle(
    run: Callable[..., str], checkpoint: Path, tmp_path: Path
) -> None:
    run(
        "sample_and_inpaint.py",
        checkpoint,
        "a red apple",
        "a green apple",
        "--out",
        tmp_path,
        "--guidance",
        1,
        "--rounds",
        1,
    )
    before, after = (np.asarray(Image.open(tmp_path / name)) for name in ("sample.png", "inpainted.png"))
    assert before.shape == after.shape == (32, 32, 3)
    assert np.abs(before[8:24, 8:24].astype(int) - after[8:24, 8:24]).mean() > 1


def test_own_pictures_become_a_snapshot_that_two_readers_agree_on_and_a_run(
    run: Callable[..., str], pictures: Path, tmp_path: Path
) -> None:
    store = str(tmp_path / "store")
    refresh, train = EXAMPLES / "own_pictures_refresh.yaml", EXAMPLES / "own_pictures_train.yaml"
    command("refresh", "--config", refresh, f"urls={pictures}", f"store={store}", "actors=1")
    snapshot = load_snapshot(open_store(store), "newest")
    assert snapshot.counts.total == 12
    assert "12 samples of shape (4, 16, 16) float16" in run("read_snapshot.py", store)
    small = (
        "steps=2",
        "ranks=1",
        "global_batch_size=4",
        "model={width: 64, layers: [1, 1]}",
        f"cache={tmp_path}/cache",
    )
    command("train", "--config", train, f"store={store}", *small, "validation_samples=1")
    assert list_steps(open_store(store), "own-pictures") == [2]


def test_every_example_says_what_it_is_for_and_takes_only_known_settings() -> None:
    files = sorted(file for file in EXAMPLES.iterdir() if file.suffix in (".py", ".yaml"))
    assert len(files) == 5
    for file in files:
        assert re.match(r'"""\w|# \w', file.read_text()), file.name
    load_config(RefreshConfig, EXAMPLES / "own_pictures_refresh.yaml", ["urls=x", "store=y"])
    load_config(TrainConfig, EXAMPLES / "own_pictures_train.yaml", ["store=y"])
    assert yaml.safe_load((EXAMPLES / "own_pictures_train.yaml").read_text())["run"] == "own-pictures"
