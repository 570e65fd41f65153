"""What is recorded of a run."""

from __future__ import annotations

import pytest

from starflow.checkpoints import checkpoint_key
from starflow.errors import ConfigError
from tests.training.small_snapshot import save_checkpoint
from training.record import own_snapshot, recorded, resolve


def test_a_checkpoint_that_is_pruned_before_it_is_read_has_a_newer_one_in_its_place(make_config, store, monkeypatch):
    config = resolve(store, make_config())
    for step in (2, 4):
        save_checkpoint(store, config, step)
    read = store.read

    def read_late(key, *span):
        if key == checkpoint_key("test", 4):
            save_checkpoint(store, config.model_copy(update={"keep_newest": 9}), 6)
            store.delete([key])
        return read(key, *span)

    monkeypatch.setattr(store, "read", read_late)
    assert recorded(store, "test")["keep_newest"] == 9


def test_weights_to_start_from_are_offered_only_once_there_are_some(make_config, store):
    config = resolve(store, make_config())
    for info in list(store.list("snapshots/")):
        store.delete([info.key])
    with pytest.raises(ConfigError, match=r"start another run on one that is there$"):
        own_snapshot(store, config)
    save_checkpoint(store, config, 2)
    with pytest.raises(ConfigError, match=r"from this one's weights: init_from=.*/test$"):
        own_snapshot(store, config)
