"""Whole runs through the supervisor with real ranks: kill one, resume, compare with an undisturbed run."""

from __future__ import annotations

import psutil
import pytest

from starflow.checkpoints import list_steps, load_checkpoint, load_manifest, verify
from starflow.model import STARFlow
from tests.training.run_helpers import command, kill_a_rank, lines, tensors, train
from training.run_commands import describe_run


def test_killed_run_ends_like_an_undisturbed_one(make_config, store, tmp_path):
    calm = make_config(run="calm", steps=30, keep_newest=20)
    killed = calm.model_copy(update={"run": "killed"})
    assert train(calm, tmp_path) == 0
    process = command(killed, tmp_path)
    kill_a_rank(killed, store, process)

    shown = describe_run(store.url, "killed")
    assert (shown["state"], shown["step"], shown["restarts"]) == ("completed", 30, 1)
    assert [event["kind"] for event in shown["events"]] == ["started", "died", "relaunch", "resumed", "completed"]
    assert tensors(store, "killed", 30) == tensors(store, "calm", 30)
    assert lines(store, "killed") == lines(store, "calm")
    assert [line["step"] for line in lines(store, "killed")] == list(range(1, 31))
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(killed.folder) in " ".join(p.info["cmdline"] or [])]

    # What sampling reads, without the training stack.
    architecture, state, trained = load_checkpoint(store, "killed")
    STARFlow(architecture).load_state_dict(state)
    assert (trained.step, trained.latent_noise, trained.attribution) == (30, 0.1, "made up")
    assert verify(store, load_manifest(store, "killed")) > 0

    assert train(killed, tmp_path) == 0  # the same command once more has nothing to do


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_set_aside(make_config, store, tmp_path):
    config = make_config(run="damaged")
    assert train(config, tmp_path) == 0
    store.write(load_manifest(store, "damaged", 6).shards[0].ema.key, b"damaged")
    assert train(config.model_copy(update={"steps": 8}), tmp_path) == 0  # its own step 6 is saved again, or delayed
    assert [line["step"] for line in lines(store, "damaged")] == list(range(1, 9))
    assert store.head("runs/damaged/bad/000000006.json")
    assert list_steps(store, "damaged")[-1] == 8
