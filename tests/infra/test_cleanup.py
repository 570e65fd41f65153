"""Retention over a store: which settings hold for which run, and that a dry run deletes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from infra.cleanup import CleanupConfig, clean_runs, clean_snapshots
from starflow import manifest
from starflow.checkpoints import checkpoint_key, list_steps
from starflow.objectstore import ObjectStore, open_store
from starflow.parts import part_from_arrays
from starflow.snapshots import Part, load_snapshot, publish, snapshot_numbers
from tests.training.small_snapshot import VAE, publish_samples, save_checkpoint
from training import retention
from training.config import TrainConfig
from training.record import RUN_KIND, RUN_VERSION, run_key


def pictures(store: ObjectStore, start: int, stop: int) -> Part:
    """A part without captions."""
    table = pa.table({"id": [f"{row:064x}" for row in range(start, stop)], "url": [""] * (stop - start)})
    latents = np.ones((stop - start, 4, 8, 8), np.float16)
    return part_from_arrays(store, VAE, latents, latents, table, [])


def settings(store: ObjectStore, run: str, **values: Any) -> TrainConfig:
    return TrainConfig.model_validate({"store": store.url, "run": run, "preset": "tiny", "snapshot": "s"} | values)


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    """Two snapshots and two runs: both have checkpoints 1 to 4, the first the best; a keeps 2, b 5 of them."""
    store = open_store(str(tmp_path / "store"))
    first = publish_samples(store, count=8)
    publish(store, parent=first, parts=[*first.parts, pictures(store, 0, 2)], image_size=16)
    for run, newest in (("a", 2), ("b", 5)):
        config = settings(store, run, keep_newest=newest)
        manifest.commit(store, run_key(run), RUN_KIND, RUN_VERSION, {"config": config.model_dump(mode="json")})
        for step in range(1, 5):
            save_checkpoint(store, config, step, held_out_bits=float(step))
    return store


def test_old_snapshots_go_but_not_in_a_dry_run(store: ObjectStore) -> None:
    assert snapshot_numbers(store) == [1, 2]
    asked = CleanupConfig(store=store.url, keep_snapshots=1, dry_run=True)
    assert clean_snapshots(store, asked)["snapshots"] == 1
    assert snapshot_numbers(store) == [1, 2]
    done = clean_snapshots(store, asked.model_copy(update={"dry_run": False}))
    assert (done["snapshots"], done["scrubbed"]) == (1, 0)
    assert snapshot_numbers(store) == [2]
    assert load_snapshot(store).counts.total == 10


def test_small_parts_are_merged_before_their_snapshots_go(store: ObjectStore) -> None:
    """Two of the three: the other one has captions."""
    newest = load_snapshot(store)
    publish(store, parent=newest, parts=[*newest.parts, pictures(store, 2, 5)], image_size=16)
    asked = CleanupConfig(store=store.url, keep_snapshots=1, compact=True, dry_run=True)
    assert "parts_after" not in clean_snapshots(store, asked)
    done = clean_snapshots(store, asked.model_copy(update={"dry_run": False}))
    assert (done["parts_before"], done["parts_after"], done["snapshots"]) == (3, 2, 3)
    assert snapshot_numbers(store) == [4]
    assert (len(load_snapshot(store).parts), load_snapshot(store).counts.total) == (2, 13)


def test_each_run_keeps_what_its_own_settings_say(store: ObjectStore) -> None:
    assert clean_runs(store, CleanupConfig(store=store.url)) == {"a": [2]}
    assert (list_steps(store, "a"), list_steps(store, "b")) == ([1, 3, 4], [1, 2, 3, 4])


def test_settings_that_were_changed_on_a_resume_count(store: ObjectStore) -> None:
    save_checkpoint(store, settings(store, "a", keep_newest=4, keep_every=5), 5)
    save_checkpoint(store, settings(store, "b", keep_newest=1), 5)
    assert clean_runs(store, CleanupConfig(store=store.url)) == {"b": [2, 3, 4]}


def test_the_form_may_say_otherwise(store: ObjectStore) -> None:
    asked = CleanupConfig(store=store.url, keep_checkpoints=1, dry_run=True)
    assert clean_runs(store, asked) == {"a": [2, 3], "b": [2, 3]}
    assert list_steps(store, "a") == [1, 2, 3, 4]


def test_a_checkpoint_that_the_run_itself_prunes_meanwhile_is_no_error(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def listed_too_late(*arguments: Any) -> list[int]:
        steps = list_steps(*arguments)
        store.delete([checkpoint_key("a", 2)])
        return steps

    monkeypatch.setattr(retention, "list_steps", listed_too_late)
    assert clean_runs(store, CleanupConfig(store=store.url)) == {}
    assert list_steps(store, "a") == [1, 3, 4]
