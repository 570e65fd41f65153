"""Whole runs through the supervisor with real ranks: kill one, resume, compare with an undisturbed run."""

from __future__ import annotations

import psutil

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

    # The same command once more has nothing to do; a damaged newest checkpoint is set aside.
    assert train(killed, tmp_path) == 0
    store.write(load_manifest(store, "killed", 30).shards[0].ema.key, b"damaged")
    longer = killed.model_copy(update={"steps": 32})  # its own step 30 is saved again, or delayed to step 31
    assert train(longer, tmp_path) == 0
    assert [line["step"] for line in lines(store, "killed")] == list(range(1, 33))
    assert store.head("runs/killed/bad/000000030.json")
    assert list_steps(store, "killed")[-1] == 32
