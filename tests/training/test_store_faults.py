"""Saves and resumes while the store is down, hangs, is slow or full, loses answers or flips bytes: a real S3 server
behind a proxy that misbehaves. What is committed stays readable, failures are counted, and the next save works."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch

from starflow.checkpoints import list_steps, load_manifest, verify
from starflow.objectstore import open_store
from tests.faulty_s3 import FaultyS3
from tests.training.one_rank import Setup
from tests.training.run_helpers import command, lines, tensors, train, until
from tests.training.small_snapshot import publish_samples
from training.lease import Lease
from training.resume import resume
from training.run_commands import describe_run

#: Long enough for a save that nothing disturbs, on a busy machine, too.
PATIENCE = 120.0

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture
def proxy(s3_url, monkeypatch):
    with FaultyS3(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.fixture
def store(proxy, s3_url):
    opened = open_store(s3_url)
    publish_samples(opened)
    return opened


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    return path


@pytest.fixture
def saved(make_config, store, metrics):
    """A run with checkpoint 2; its state has moved on since."""
    Lease(store, "test", "tester:1:1", seconds=600).acquire()
    setup = Setup(make_config(ranks=1, save_timeout=PATIENCE))
    setup.train(2)
    assert setup.save(2, metrics) == ""
    setup.train(1)
    yield setup
    setup.saver.close()


def resumed(setup, store, make_config):
    """The state that a new process finds in the store."""
    other = Setup(make_config(ranks=1), seed=5)
    step = resume(store, other.config, other.engine, other.ema).step
    return step, other.state()


def same(state, other):
    return all(torch.equal(a, b) for a, b in zip(state, other, strict=True))


@pytest.mark.parametrize("mode", ["down", "hang"])
def test_a_store_that_is_away_fails_the_save_in_time_and_harms_nothing(saved, store, proxy, metrics, make_config, mode):
    setup = saved
    setup.saver._config = setup.config.model_copy(update={"save_timeout": 1.5})
    proxy.mode = mode
    began = time.monotonic()
    assert "no answer from the store within 2 s; see save_timeout" in setup.save(3, metrics)
    assert time.monotonic() - began < PATIENCE / 2
    assert (setup.saver.failures, setup.saver.committed) == (1, 2)
    proxy.mode = ""
    assert list_steps(store, "test") == [2]
    setup.saver._config = setup.config
    assert setup.save(3, metrics) == ""
    assert (setup.saver.failures, setup.saver.committed) == (0, 3)
    step, state = resumed(setup, store, make_config)
    assert step == 3
    assert same(state, setup.state())


@pytest.mark.parametrize("mode", ["507", "denied"])
def test_a_full_store_and_refused_credentials_are_said_at_once(saved, store, proxy, metrics, mode):
    proxy.only = "^(PUT|POST) .*/shards/"
    proxy.mode = mode
    error = saved.save(3, metrics)
    assert {"507": "is full", "denied": "refuses these credentials"}[mode] in error
    assert "/shards/000000003-" in error
    proxy.mode = ""
    assert saved.save(3, metrics) == ""
    verify(store, load_manifest(store, "test", 3))


@pytest.mark.parametrize(("mode", "only"), [("lost", "^PUT .*/checkpoints/"), ("lost", "^PUT .*/shards/"), ("503", "")])
def test_lost_and_refused_answers_are_asked_for_again(saved, store, proxy, metrics, mode, only):
    proxy.only, proxy.count = only, 2
    proxy.mode = mode
    assert saved.save(3, metrics) == ""
    assert proxy.struck == 2
    verify(store, load_manifest(store, "test", 3))


def test_a_byte_flipped_on_the_way_up_never_arrives(saved, store, proxy, metrics, make_config):
    proxy.only, proxy.count = "^PUT .*/shards/.*weights", 1
    proxy.mode = "flip"
    if error := saved.save(3, metrics):  # the server's answer to a wrong checksum is no invitation to try again
        assert "weights-00000" in error
        assert list_steps(store, "test") == [2]
        assert saved.save(3, metrics) == ""
    step, state = resumed(saved, store, make_config)
    assert step == 3
    assert same(state, saved.state())


def test_a_byte_flipped_on_the_way_down_costs_no_checkpoint(saved, store, proxy, metrics, make_config, monkeypatch):
    # Without the client's own check, as it is for ranges of large objects.
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    fresh = open_store(store.url)
    proxy.only, proxy.count = "^GET .*/shards/.*ema", 1
    proxy.mode = "flip"
    assert resumed(saved, fresh, make_config)[0] == 2
    assert proxy.struck == 1
    assert list_steps(store, "test") == [2]


def test_a_flipped_byte_in_the_store_goes_back_one_checkpoint(saved, store, metrics, make_config):
    before = saved.state()
    assert saved.save(3, metrics) == ""
    saved.train(1)
    assert saved.save(4, metrics) == ""
    key = load_manifest(store, "test", 4).shards[0].optimizer.key
    data = bytearray(store.read(key))
    data[len(data) // 2] ^= 1
    store.write(key, bytes(data))
    step, state = resumed(saved, store, make_config)
    assert step == 3
    assert same(state, before)


def test_a_slow_store_delays_the_next_save_only(saved, store, proxy, metrics, make_config):
    proxy.only, proxy.rate = "^PUT .*/shards/", 1000.0
    proxy.mode = "slow"
    saved.begin(3, metrics)  # which at that rate takes longer than it may
    before = saved.state()
    saved.train(1)  # while the save is in flight
    assert saved.saver.busy
    faster = threading.Timer(0.5, setattr, (proxy, "rate", 300_000.0))
    faster.start()
    saved.begin(4, metrics)  # waits for it
    faster.join()
    assert saved.saver.committed == 3
    proxy.mode = ""
    saved.saver.wait(lambda: None)
    assert saved.saver.committed == 4
    store.delete([f"runs/test/checkpoints/{4:09d}.json"])
    step, state = resumed(saved, store, make_config)
    assert step == 3
    assert same(state, before)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_through_every_fault_ends_like_an_undisturbed_one(make_config, store, proxy, tmp_path):
    values = {"steps": 600, "checkpoint_every": 10, "keep_newest": 4, "save_timeout": 30.0, "max_failed_saves": 99}
    calm, stormy = (make_config(run=run, hang_timeout=120.0, **values) for run in ("calm", "stormy"))
    assert train(calm, tmp_path, 900) == 0
    process = command(stormy, tmp_path)
    proxy.only, proxy.rate = "/shards/|/checkpoints/", 50_000.0
    for mode in ("down", "hang", "lost", "507", "503", "flip", "slow"):
        committed = until(lambda: list_steps(store, "stormy"))[-1]
        proxy.mode = mode
        until(lambda: proxy.struck or process.poll() is not None)
        time.sleep(3)  # how long the fault lasts
        proxy.mode = ""
        until(lambda last=committed: list_steps(store, "stormy")[-1] > last or process.poll() is not None)
    assert process.wait(timeout=600) == 0
    assert tensors(store, "stormy", 600) == tensors(store, "calm", 600)
    assert lines(store, "stormy") == lines(store, "calm")
    for step in list_steps(store, "stormy"):
        verify(store, load_manifest(store, "stormy", step))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_store_that_takes_nothing_more_stops_the_run_visibly(make_config, store, proxy, tmp_path):
    config = make_config(steps=100_000, checkpoint_every=20, save_timeout=30.0, max_failed_saves=2, max_restarts=0)
    process = command(config, tmp_path)
    committed = until(lambda: list_steps(store, config.run))[-1]
    proxy.only = "^(PUT|POST) .*/shards/"
    proxy.mode = "507"
    assert process.wait(timeout=300) == 1
    proxy.mode = ""
    messages = [event["message"] for event in describe_run(store.url, config.run)["events"]]
    assert any("2 saves in a row failed" in message and "is full" in message for message in messages)
    assert list_steps(store, config.run)[-1] >= committed
