"""Whole runs through the supervisor with real ranks: kill them, resume them, compare with an undisturbed run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from starflow.checkpoints import list_steps, load_checkpoint, load_manifest, verify
from starflow.model import STARFlow
from training.launch import PREEMPTED_STATUS, read_heartbeats
from training.metrics import read_metrics
from training.run_commands import describe_run

#: What differs between two runs of the same computation.
TIMING = {"seconds", "images_per_second", "data_wait", "text_seconds"}


def command(config, tmp_path):
    """`starflow train` on the configuration, as a process of its own."""
    file = tmp_path / f"{config.run}.yaml"
    file.write_text(config.model_dump_json())  # JSON is YAML
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "starflow.cli", "train", "--config", str(file)], env=environment)


def train(config, tmp_path):
    process = command(config, tmp_path)
    try:
        return process.wait(timeout=200)
    finally:
        process.kill()


def until(condition, seconds=100):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.05)
    return found


def ranks_of(config):
    """Process ids by rank of the newest attempt."""
    attempts = sorted((config.folder / "attempts").glob("*"))
    return {rank: pid for rank, (pid, _) in read_heartbeats(attempts[-1]).items()} if attempts else {}


def tensors(store, run, step):
    """Checksums of everything that decides the future."""
    return [
        (shard.weights.sha256, shard.ema.sha256, shard.optimizer.sha256)
        for shard in load_manifest(store, run, step).shards
    ]


def lines(store, run):
    """The metrics without what the clock decides."""
    found = read_metrics(store.read(f"runs/{run}/metrics.jsonl"))
    return [{key: value for key, value in line.items() if key not in TIMING} for line in found]


def kill_a_rank(config, store, process, rank=1, after=2):
    """SIGKILLs a rank once `after` steps are committed."""
    until(lambda: any(step >= after for step in list_steps(store, config.run)))
    os.kill(ranks_of(config)[rank], signal.SIGKILL)
    assert process.wait(timeout=200) == 0


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


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_other_stages_resume_exactly(make_config, store, tmp_path, stage):
    calm = make_config(run="calm", steps=20, zero_stage=stage)
    killed = calm.model_copy(update={"run": "killed"})
    assert train(calm, tmp_path) == 0
    kill_a_rank(killed, store, command(killed, tmp_path), rank=0)
    assert tensors(store, "killed", 20) == tensors(store, "calm", 20)
    assert lines(store, "killed") == lines(store, "calm")


@pytest.mark.slow
def test_sigterm_saves_and_leaves_with_a_status_of_its_own(make_config, store, tmp_path):
    config = make_config(steps=500, checkpoint_every=100)
    process = command(config, tmp_path)
    until(lambda: ranks_of(config))
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=100) == PREEMPTED_STATUS
    shown = describe_run(store.url, config.run)
    assert shown["state"] == "preempted"
