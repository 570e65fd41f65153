"""Runs that are killed, stopped, frozen or starved; see test_train.py for the plain kill and resume."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time

import psutil
import pytest

from starflow.checkpoints import list_steps
from tests.training.run_helpers import command, kill_a_rank, lines, ranks_of, tensors, train, until
from training.launch import PREEMPTED_STATUS
from training.run_commands import describe_run

pytestmark = pytest.mark.slow


def descendants(process):
    return psutil.Process(process.pid).children(recursive=True)


def gone(processes, seconds=15):
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return not alive


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_other_stages_resume_exactly(make_config, store, tmp_path, stage):
    calm = make_config(run="calm", steps=20, zero_stage=stage)
    killed = calm.model_copy(update={"run": "killed"})
    assert train(calm, tmp_path) == 0
    kill_a_rank(killed, store, command(killed, tmp_path), rank=0)
    assert tensors(store, "killed", 20) == tensors(store, "calm", 20)
    assert lines(store, "killed") == lines(store, "calm")


def test_sigterm_saves_and_leaves_with_a_status_of_its_own(make_config, store, tmp_path):
    config = make_config(steps=5000, checkpoint_every=1000)
    process = command(config, tmp_path)
    until(lambda: ranks_of(config))
    children = descendants(process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=100) == PREEMPTED_STATUS
    assert gone(children)
    shown = describe_run(store.url, config.run)
    assert shown["state"] == "preempted"
    assert len(lines(store, config.run)) == shown["step"]
    longer = config.model_copy(update={"steps": shown["step"] + 2})
    assert train(longer, tmp_path) == 0


def test_a_frozen_rank_is_ended_and_the_run_goes_on(make_config, store, tmp_path):
    config = make_config(steps=400, checkpoint_every=20, hang_timeout=40.0)  # a busy machine starts ranks in 20 s
    process = command(config, tmp_path)
    until(lambda: list_steps(store, config.run))
    os.kill(ranks_of(config)[1], signal.SIGSTOP)
    assert process.wait(timeout=250) == 0
    messages = [event["message"] for event in describe_run(store.url, config.run)["events"]]
    assert any("no sign of life" in message for message in messages)


def test_a_killed_supervisor_leaves_no_orphan_and_no_lock(make_config, store, tmp_path):
    config = make_config(steps=400, checkpoint_every=20)
    process = command(config, tmp_path)
    until(lambda: list_steps(store, config.run))
    children = descendants(process)
    assert len(children) >= 5  # torchrun, two ranks, two uploaders
    process.kill()
    process.wait()
    assert gone(children)
    began = time.monotonic()
    assert train(config.model_copy(update={"steps": 402}), tmp_path) == 0
    assert time.monotonic() - began < 200
    assert [line["step"] for line in lines(store, config.run)] == list(range(1, 403))


def test_two_supervisors_of_one_run(make_config, store, tmp_path):
    config = make_config(steps=4000, checkpoint_every=1000, lease_seconds=2.0)
    first = command(config, tmp_path)
    until(lambda: ranks_of(config))
    assert train(config, tmp_path) == 1  # says who is writing
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=100) == PREEMPTED_STATUS


def test_a_store_that_goes_away_stops_the_run_and_harms_nothing(make_config, store, tmp_path):
    config = make_config(steps=4000, checkpoint_every=20, max_failed_saves=2, max_restarts=0, keep_newest=50)
    process = command(config, tmp_path)
    until(lambda: len(list_steps(store, config.run)) > 1)
    shards = store.path(f"runs/{config.run}/shards")
    before = {path: path.read_bytes() for path in store.path(f"runs/{config.run}/checkpoints").glob("*.json")}
    shutil.move(shards, tmp_path / "away")
    shards.write_text("in the way")  # every write below it fails now
    assert process.wait(timeout=100) == 1
    shards.unlink()
    shutil.move(tmp_path / "away", shards)
    assert all(path.read_bytes() == data for path, data in before.items())
    assert any("saves in a row failed" in e["message"] for e in describe_run(store.url, config.run)["events"])
    assert train(config.model_copy(update={"steps": list_steps(store, config.run)[-1] + 5}), tmp_path) == 0


def test_kills_at_random_moments_end_alike(make_config, store, tmp_path):
    moments = random.Random(0)
    calm = make_config(run="calm", steps=150, checkpoint_every=5, keep_newest=50, max_restarts=10)
    killed = calm.model_copy(update={"run": "killed"})
    assert train(calm, tmp_path) == 0
    process = command(killed, tmp_path)
    for _ in range(6):
        time.sleep(moments.uniform(0, 12))
        if process.poll() is not None:
            break
        victims = [p for p in descendants(process) if p.is_running()]  # torchrun, ranks, uploaders
        if victims:
            moments.choice(victims).kill()
    assert process.wait(timeout=250) == 0
    assert tensors(store, "killed", 150) == tensors(store, "calm", 150)
    assert lines(store, "killed") == lines(store, "calm")
