"""The commands over snapshots, as a user or a program runs them."""

import hashlib
import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from starflow.cli import app
from starflow.encoders import load_vae, new_autoencoder
from starflow.errors import ConfigError, CorruptError, NotFoundError, StoreError
from starflow.objectstore import open_store
from starflow.parts import LayerPlan, part_from_arrays
from starflow.snapshots import publish


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    new_autoencoder(resolution=16, channels=2, widths=(8, 8), layers=1, groups=4).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def store(tmp_path, vae_folder):
    """Two snapshots: square pictures, then also wide ones."""
    store = open_store(str(tmp_path / "store"))
    vae = load_vae(vae_folder).identity
    parts = []
    for start, grid in ((0, (8, 8)), (100, (4, 8))):
        latents = np.random.default_rng(start).normal(size=(2, 20, 2, *grid)).astype(np.float16)
        numbers = range(start, start + 20)
        samples = pa.table(
            {
                "id": [hashlib.sha256(str(n).encode()).hexdigest() for n in numbers],
                "url": [f"http://h{n % 2}/{n}" for n in numbers],
            }
        )
        captions = [f"<b>caption {n}</b>" for n in numbers]
        parts.append(
            part_from_arrays(store, vae, *latents, samples, [(LayerPlan(origin="alt-text", version="1"), captions)])
        )
    first = publish(store, parent=None, parts=parts[:1], image_size=16, attribution="by somebody")
    publish(store, parent=first, parts=parts, image_size=16, dropped={"404": 3}, attribution="by somebody")
    return store.url


def run(*arguments):
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_list_and_show(store):
    listed = json.loads(run("snapshots", "list", "--store", store, "--json"))
    assert [snapshot["counts"]["total"] for snapshot in listed] == [20, 40]
    assert listed[1]["id"] in run("snapshots", "list", "--store", store)
    shown = run("snapshots", "show", "--store", store)
    assert "16 x 8: 20" in shown
    assert "404: 3" in shown
    assert "by somebody" in shown
    assert json.loads(run("snapshots", "show", "1", "--store", store, "--json"))["number"] == 1
    with pytest.raises(NotFoundError, match="snapshots 1 to 2"):
        run("snapshots", "show", "9", "--store", store)


def test_diff_verify_takedown_and_gc(store):
    found = json.loads(run("snapshots", "diff", "1", "--store", store, "--json"))
    assert (found["added"], found["removed"]) == (20, 0)
    assert "latents 4x8" in run("snapshots", "diff", "1", "2", "--store", store)
    assert "intact" in run("snapshots", "verify", "--store", store, "--read")
    answer = json.loads(run("takedown", "--host", "h1", "--url", "http://h0/4", "--store", store, "--json"))
    assert (answer["removed"], answer["total"]) == (21, 19)
    assert answer["rules"] == {"host h1": 20, "url http://h0/4": 1}
    assert answer["withdrawn"] == 2
    assert json.loads(run("snapshots", "gc", "--store", store, "--dry-run", "--json"))["objects"] > 0
    assert "holds samples that were taken down" in run("snapshots", "gc", "--store", store, "--dry-run")
    garbage = json.loads(run("snapshots", "gc", "--store", store, "--json"))
    assert len(garbage["snapshots"]) == 2
    assert "all 2 parts are there" in run("snapshots", "verify", "--store", store)
    opened = open_store(store)
    key = next(info.key for info in opened.list("parts/") if "/mean/c/" in info.key)
    opened.delete([key])
    with pytest.raises(CorruptError, match="1 problems"):
        run("snapshots", "verify", "--store", store)


def test_takedown_reads_a_list(store, tmp_path):
    lines = ["http://h0/0", hashlib.sha256(b"2").hexdigest().upper(), "", "# asked for by mail", "h1"]
    (tmp_path / "list.txt").write_text("\n".join(lines), encoding="utf-8-sig")
    assert "22 samples removed" in run("takedown", "--file", str(tmp_path / "list.txt"), "--store", store)
    with pytest.raises(ConfigError, match="--file"):
        run("takedown", "--store", store)
    with pytest.raises(NotFoundError, match=r"no-such\.txt cannot be read"):
        run("takedown", "--file", str(tmp_path / "no-such.txt"), "--store", store)
    (tmp_path / "latin.txt").write_bytes("http://h0/é".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.txt is not UTF-8 .* at byte 10\)"):
        run("takedown", "--file", str(tmp_path / "latin.txt"), "--store", store)


def test_a_dry_run_counts_and_publishes_nothing(store):
    asked = ("takedown", "--url", "HTTP://H0:80/4#x", "--host", "h1", "--host", "h2", "--store", store, "--dry-run")
    found = json.loads(run(*asked, "--json"))
    assert (found["removed"], found["total"]) == (21, 40)
    assert found["rules"] == {"host h1": 20, "url http://h0/4": 1, "host h2": 0}
    assert "21 of 40 samples would be removed" in run(*asked)
    assert len(json.loads(run("snapshots", "list", "--store", store, "--json"))) == 2


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--id", "abc"),
        ("--host", "http://h1/"),
        ("--host", "h1:80"),
        ("--host", "h1/4"),
        ("--host", ""),
        ("--url", "h1/4"),
    ],
)
def test_takedown_of_what_no_sample_can_be_is_refused(store, option, value):
    with pytest.raises(ConfigError, match="takedown of"):
        run("takedown", option, value, "--store", store)
    assert len(json.loads(run("snapshots", "list", "--store", store, "--json"))) == 2


def test_takedown_says_when_nothing_matched(store):
    assert "held none" in run("takedown", "--host", "elsewhere.example", "--store", store)
    assert "held none" in run("takedown", "--host", "::1", "--store", store)
    assert "gc --store" in run("takedown", "--host", "h1", "--store", store)


def test_preview_writes_a_page_and_grids(store, tmp_path, vae_folder):
    answer = json.loads(run("preview", "--store", store, "--out", str(tmp_path / "out"), "--count", "10", "--json"))
    assert answer["samples"] == 10
    page = (tmp_path / "out" / "index.html").read_text()
    assert "&lt;b&gt;caption" in page
    assert "by somebody" in page
    grids = sorted(path.name for path in (tmp_path / "out").glob("grid-*.png"))
    assert grids == ["grid-4x8.png", "grid-8x8.png"]
    sizes = {Image.open(path).size for path in (tmp_path / "out").glob("8x8-*.png")}
    assert sizes == {(16, 16)}


def test_preview_refuses_another_vae(store, tmp_path):
    other = tmp_path / "other"
    torch.manual_seed(1)
    new_autoencoder(resolution=16, channels=2, widths=(8, 8), layers=1, groups=4).save_pretrained(other)
    with pytest.raises(StoreError, match="other weights"):
        run("preview", "--store", store, "--out", str(tmp_path / "out"), "--vae", str(other))
