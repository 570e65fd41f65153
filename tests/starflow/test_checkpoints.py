"""Which runs and checkpoints a store has."""

from __future__ import annotations

from pathlib import Path

import pytest

from starflow.checkpoints import list_runs, load_manifest
from starflow.errors import NotFoundError
from starflow.objectstore import open_store


def test_runs_are_folders_with_a_run_json(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    for key in ("runs/b/run.json", "runs/a/run.json", "runs/x/lease.json", "runs/y/sub/run.json", "runs/run.json"):
        store.write(key, b"{}")
    assert list_runs(store) == ["a", "b"]


def test_an_unknown_checkpoint_names_what_there_is(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with pytest.raises(NotFoundError, match=r"holds no runs.*STORE/RUN@STEP"):
        load_manifest(store, "a")
    store.write("runs/b/run.json", b"{}")
    with pytest.raises(NotFoundError, match=r"choose one of its runs: b$"):
        load_manifest(store, "a", 3)
    with pytest.raises(NotFoundError, match=r"'b' .* no committed checkpoint yet"):
        load_manifest(store, "b")
    store.write("runs/b/checkpoints/000000002.json", b"{}")
    with pytest.raises(NotFoundError, match=r"checkpoint 3 of run 'b' .* committed steps: 2"):
        load_manifest(store, "b", 3)
