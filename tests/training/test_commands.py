"""`starflow runs` and `starflow checkpoints` on stores with little in them."""

from __future__ import annotations

import pytest

from starflow.errors import NotFoundError
from starflow.objectstore import open_store
from training.checkpoint_commands import list_ as list_checkpoints
from training.record import resolve
from training.run_commands import list_ as list_runs
from training.train_command import dry_run_plan


def test_runs_list_skips_what_is_no_run(make_config, store, capsys):
    resolve(store, make_config())
    store.write("runs/x/lease.json", b"{}")
    list_runs(store.url)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["test"]


def test_dry_run_leaves_no_run(make_config, store):
    before = {info.key for info in store.list()}
    written = []
    write = type(store).write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(store), "write", lambda self, key, data: (written.append(key), write(self, key, data)))
        assert dry_run_plan(make_config())["store_writable"]
    assert not [key for key in written if key.startswith("runs/")]
    assert {info.key for info in store.list()} == before


def test_checkpoints_list(make_config, store, tmp_path, capsys):
    with pytest.raises(NotFoundError, match="holds no runs"):
        list_checkpoints("nosuch", str(tmp_path / "empty"))
    resolve(store, make_config())
    with pytest.raises(NotFoundError, match="choose one of its runs: test"):
        list_checkpoints("nosuch", store.url)
    list_checkpoints("test", store.url, as_json=True)
    assert capsys.readouterr().out.strip() == "[]"
    assert not list(open_store(str(tmp_path / "empty")).list())
