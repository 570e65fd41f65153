"""`starflow runs` and `starflow checkpoints` on stores with little in them."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from starflow.checkpoints import checkpoint_key
from starflow.errors import ConfigError, NotFoundError, UnavailableError
from starflow.objectstore import open_store
from tests.training.small_snapshot import save_checkpoint
from training.checkpoint_commands import list_ as list_checkpoints
from training.checkpoint_commands import prune
from training.record import resolve
from training.run_commands import compare, describe_run, show
from training.run_commands import list_ as list_runs
from training.train_command import dry_run_plan


def test_runs_list_skips_what_is_no_run(make_config, store, capsys):
    resolve(store, make_config())
    store.write("runs/x/lease.json", b"{}")
    list_runs(store.url)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.split() == ["test", "interrupted", "no", "checkpoint", "of", "6", "preset", "tiny"]


def test_runs_list_shows_a_run_of_another_release_as_unreadable(make_config, store, capsys):
    for run in ("one", "two"):
        config = resolve(store, make_config(run=run))
        save_checkpoint(store, config, 2)
    key = checkpoint_key("one", 2)
    store.write(key, json.dumps(json.loads(store.read(key)) | {"spin": 1}).encode())
    list_runs(store.url)
    one, two = capsys.readouterr().out.splitlines()
    assert one.startswith("one ")
    assert "unreadable" in one
    assert "does not read (spin); use release test" in one
    assert two.split()[:2] == ["two", "interrupted"]
    list_runs(store.url, as_json=True)
    one, two = json.loads(capsys.readouterr().out)
    assert one.keys() == two.keys()
    assert (one["state"], two["message"]) == ("unreadable", None)


def test_a_store_that_does_not_answer_is_no_unreadable_run(make_config, store, monkeypatch):
    resolve(store, make_config())

    def away(*_):
        raise UnavailableError("away")

    monkeypatch.setattr(type(store), "read", away)
    with pytest.raises(UnavailableError):
        list_runs(store.url)


def test_dry_run_leaves_no_run(make_config, store):
    before = {info.key for info in store.list()}
    written = []
    write = type(store).write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(store), "write", lambda self, key, data: (written.append(key), write(self, key, data)))
        assert dry_run_plan(make_config())["store_writable"]
    assert not [key for key in written if key.startswith("runs/")]
    assert {info.key for info in store.list()} == before


def test_dry_run_says_where_it_would_begin_and_refuses_what_the_run_would(make_config, store):
    config = make_config()
    assert dry_run_plan(config)["begins"] == "a new run"
    resolve(store, config)
    store.write("runs/test/checkpoints/000000004.json", b"")
    assert dry_run_plan(config)["begins"] == "resumes from step 4"
    assert dry_run_plan(make_config(steps=4))["begins"] == "complete: nothing is left to do"
    with pytest.raises(ConfigError, match="was started with seed=0"):
        dry_run_plan(make_config(seed=1))
    with pytest.raises(ConfigError, match="cannot start from"):
        dry_run_plan(make_config(run="other", init_from=f"{store.url}/nope"))


def test_checkpoints_list(make_config, store, tmp_path, capsys):
    with pytest.raises(NotFoundError, match="holds no runs"):
        list_checkpoints("nosuch", str(tmp_path / "empty"))
    resolve(store, make_config())
    with pytest.raises(NotFoundError, match="choose one of its runs: test"):
        list_checkpoints("nosuch", store.url)
    list_checkpoints("test", store.url, as_json=True)
    assert capsys.readouterr().out.strip() == "[]"
    assert not list(open_store(str(tmp_path / "empty")).list())


def test_compare_draws_all_runs_and_names_the_differences(make_config, store, tmp_path, capsys):
    for run, rate in (("one", 1e-3), ("two", 2e-3)):
        resolve(store, make_config(run=run, learning_rate=rate))
        lines = [{"step": n, "bits_per_dim": 1 / n, "grad_norm": rate, "images_per_second": 9.0} for n in range(1, 9)]
        store.write(f"runs/{run}/metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    compare(["one", "two"], store.url, tmp_path / "out" / "curves.png", as_json=True)
    answer = json.loads(capsys.readouterr().out)
    assert answer["differences"] == {"learning_rate": {"one": 0.001, "two": 0.002}}
    with Image.open(answer["picture"]) as picture:
        assert len(picture.convert("RGB").getcolors(2**20)) > 50  # curves, not a blank page
    with pytest.raises(NotFoundError, match="'three'"):
        compare(["one", "three"], store.url, tmp_path / "curves.png")


def test_show_names_the_newest_pictures(make_config, store, capsys):
    resolve(store, make_config())
    for step in (2, 4):
        store.write(f"runs/test/samples/{step:09d}.png", b"")
    assert describe_run(store.url, "test")["sample_grids"][-1] == "runs/test/samples/000000004.png"
    show("test", store.url)
    assert f"{store.url}/runs/test/samples/000000004.png" in capsys.readouterr().out


def test_prune_may_only_say_what_would_go(make_config, store, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("training.retention.prune", lambda *args: asked.append(args[1:]) or [2])
    for step in (2, 4):
        store.write(f"runs/test/checkpoints/{step:09d}.json", b"")
    prune("test", store.url, keep_newest=1, keep_every=None, dry_run=True)
    assert capsys.readouterr().out == "would delete [2], keep [4]\n"
    assert asked == [("test", 1, None, True)]
