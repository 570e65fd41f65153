"""What is recorded of a run."""

from __future__ import annotations

from starflow.checkpoints import checkpoint_key
from tests.training.small_snapshot import save_checkpoint
from training.record import recorded, resolve


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
