"""What is known of a run before anything starts."""

from __future__ import annotations

import pytest

from starflow.checkpoints import Checkpoint
from starflow.errors import ConfigError
from training import architecture
from training.architecture import check


def test_a_configuration_that_fits_gives_model_and_snapshot(make_config, store):
    flow, snapshot = check(store, make_config())
    assert flow.width == 64
    assert snapshot.number == 1


def test_text_needs_an_encoder(make_config, store):
    with pytest.raises(ConfigError, match="set text_encoder"):
        check(store, make_config(text_encoder=None))


def test_first_weights_that_do_not_exist_are_named(make_config, store):
    for checkpoint in (f"{store.url}/nope", f"{store.url}/nope@30"):
        with pytest.raises(ConfigError, match=f"cannot start from {checkpoint}: run 'nope' is not in"):
            check(store, make_config(init_from=checkpoint))


def test_first_weights_may_be_gone_once_the_run_has_a_checkpoint(make_config, store):
    store.write("runs/test/checkpoints/000000004.json", b"")
    assert check(store, make_config(init_from=f"{store.url}/nope"))


def test_first_weights_of_another_architecture_are_refused_but_for_patch_and_grid(make_config, store, monkeypatch):
    flow, _ = check(store, make_config())

    def other(**values):
        found = Checkpoint.model_construct(model={**flow.to_dict(), **values})
        monkeypatch.setattr(architecture, "load_manifest", lambda *_: found)

    other(grid=[4, 4], patch=2)
    check(store, make_config(init_from="s3://bucket/run"))
    other(width=128)
    with pytest.raises(ConfigError, match=r"s3://bucket/run has width 128, the model to be trained 64"):
        check(store, make_config(init_from="s3://bucket/run"))
