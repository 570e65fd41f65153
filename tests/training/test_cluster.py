"""Several machines: each supervisor below stands for one, with a cache of its own, on the loopback interface."""

from __future__ import annotations

import os
import signal
import time

import pytest

from starflow.checkpoints import list_steps
from starflow.errors import ConfigError
from starflow.objectstore import open_store
from tests.faulty_s3 import FaultyS3
from tests.training.run_helpers import command, lines, ranks_of, tensors, train, until
from tests.training.small_snapshot import publish_samples
from training.cluster import (
    Announcement,
    Place,
    place_from_environment,
    read_announcement,
    stop_key,
    with_ranks,
)
from training.events import Events, read_events
from training.lease import Lease, LeaseHeldError
from training.supervisor import Supervisor


def environment(node, **more):
    return {
        "STARFLOW_NODES": "2",
        "STARFLOW_NODE_RANK": str(node),
        "STARFLOW_ADDRESS": "127.0.0.1",
        "STARFLOW_LAUNCH": "one",
        **more,
    }


def machine(config, tmp_path, node, **more):
    """Starts the supervisor of machine `node`."""
    own = config.model_copy(update={"cache": tmp_path / f"cache-{node}"})
    own.cache.mkdir(exist_ok=True)
    null = own.cache / "null-captions"
    if not null.exists():
        os.symlink(config.cache / "null-captions", null)
    return own, command(own, tmp_path, environment(node, **more), name=f"{config.run}-{node}")


def attempts(store, run):
    return [e["message"] for e in read_events(store, run) if e["kind"] in ("started", "resumed")]


def test_place():
    assert place_from_environment({}) == Place()
    place = place_from_environment(environment(1, STARFLOW_MIN_NODES="2", STARFLOW_PATIENCE="7"))
    assert (place.node, place.address, place.share(8), place.min_nodes, place.patience) == (1, "127.0.0.1", 4, 2, 7)
    with pytest.raises(ConfigError, match="ranks 3 do not divide over 2"):
        place.share(3)
    with pytest.raises(ConfigError, match="STARFLOW_LAUNCH is not set"):
        place_from_environment({k: v for k, v in environment(1).items() if k != "STARFLOW_LAUNCH"})
    with pytest.raises(ConfigError, match="STARFLOW_NODE_RANK=x is not a whole number"):
        place_from_environment(environment("x"))
    with pytest.raises(ConfigError, match="numbered from 0"):
        place_from_environment(environment(2))


def test_rendezvous():
    news = Announcement(launch="one", attempt=3, members=("b", "a"), ranks=4, master="10.0.0.1:4000")
    assert news.torchrun("a") == [
        "--nnodes",
        "2",
        "--node-rank",
        "1",
        "--master-addr",
        "10.0.0.1",
        "--master-port",
        "4000",
    ]
    assert not news.on_one_machine
    assert news.model_copy(update={"members": ("b",)}).torchrun("b") == ["--standalone"]
    assert news.model_copy(update={"master": "127.0.0.1:4000"}).on_one_machine


def test_a_job_that_was_requeued_finds_the_request_to_stop_its_launch():
    assert stop_key("r", "20260102T030405-0123abcd.3") == stop_key("r", "20260102T030405-0123abcd")


def test_a_machine_that_was_cut_off_is_silent(make_config, store):
    """It neither announces anything nor writes over the events of the one that leads now."""
    config = make_config(ranks=2)
    late = Supervisor(config, Place(nodes=2, launch="one"))
    late.events = Events(store, config.run)
    Lease(store, config.run, "elsewhere:1:1").acquire()
    Events(store, config.run).add("started", "attempt 1", 1, None)
    with pytest.raises(LeaseHeldError, match="taken over by process 1 on elsewhere"):
        late._announce(Announcement(launch="one", attempt=1, outcome="failed"))
    assert read_announcement(store, config.run, "one") is None
    late._lost = "taken over"
    late._tell("failed", "taken over")
    assert [event["kind"] for event in read_events(store, config.run)] == ["started"]


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "fewer", "expected"),
    [(8, None, 2, 1, 4), (24, None, 4, 3, 4), (24, 3, 4, 2, 3), (8, None, 4, 3, None), (8, 2, 2, 2, 2)],
)
def test_fewer_ranks_use_no_more_memory_a_pass(make_config, batch, micro, ranks, fewer, expected):
    config = make_config(global_batch_size=batch, micro_batch_size=micro, ranks=ranks)
    changed = with_ranks(config, fewer)
    if expected is None:
        assert changed is None
    else:
        assert (changed.ranks, changed.micro) == (fewer, expected)
        assert type(config).model_validate(changed.model_dump()) == changed


@pytest.mark.slow
def test_two_machines_lose_a_rank_and_go_on(make_config, store, tmp_path):
    calm = make_config(run="calm", steps=60, checkpoint_every=10)
    assert train(calm, tmp_path) == 0
    config = calm.model_copy(update={"run": "two"})
    _, first = machine(config, tmp_path, 0)
    other, second = machine(config, tmp_path, 1)
    try:
        until(lambda: list_steps(store, "two"))
        os.kill(next(iter(ranks_of(other).values())), signal.SIGKILL)
        assert first.wait(timeout=200) == 0
        assert second.wait(timeout=60) == 0
    finally:
        first.terminate()
        second.terminate()
    assert tensors(store, "two", 60) == tensors(store, "calm", 60)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_machine_goes_and_comes_back(make_config, store, tmp_path, lost):
    """Machine `lost` (0: the leader) is killed; the other goes on alone; when it is started again both do."""
    config = make_config(run="elastic", steps=400, checkpoint_every=20, validation_every=400)
    patience = {"STARFLOW_PATIENCE": "2"}
    processes = [machine(config, tmp_path, node, **patience)[1] for node in (0, 1)]
    try:
        until(lambda: list_steps(store, "elastic"))
        processes[lost].kill()
        until(lambda: any("1 rank on 1 of 2 machines" in text for text in attempts(store, "elastic")))
        alone = list_steps(store, "elastic")[-1]
        until(lambda: list_steps(store, "elastic")[-1] > alone)
        processes[lost].wait()
        _, processes[lost] = machine(config, tmp_path, lost, **patience)
        assert [process.wait(timeout=200) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    assert "2 ranks on 2 of 2 machines" in attempts(store, "elastic")[-1]
    found = lines(store, "elastic")
    assert [line["step"] for line in found] == list(range(1, 401))
    assert [line["samples"] for line in found] == list(range(8, 8 * 401, 8))


@pytest.mark.slow
def test_stop_through_the_store_ends_all_machines_for_good(make_config, store, tmp_path):
    config = make_config(run="stopped", steps=5000, checkpoint_every=50, validation_every=5000)
    processes = [machine(config, tmp_path, node)[1] for node in (0, 1)]
    try:
        until(lambda: list_steps(store, "stopped"))
        store.write(stop_key("stopped", "one"), b"")
        assert [process.wait(timeout=60) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    assert read_events(store, "stopped")[-1]["kind"] == "preempted"
    assert not list(store.list("runs/stopped/nodes/"))


@pytest.mark.slow
def test_a_store_that_is_away_longer_than_the_lease_ends_no_attempt(make_config, s3_url, monkeypatch, tmp_path):
    with FaultyS3(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        store = open_store(s3_url)
        publish_samples(store)
        values = {"steps": 100_000, "checkpoint_every": 20, "validation_every": 100_000, "save_timeout": 3.0}
        config = make_config(store=s3_url, run="away", max_failed_saves=99, **values)
        processes = [machine(config, tmp_path, node)[1] for node in (0, 1)]
        try:
            before = until(lambda: list_steps(store, "away"))[-1]
            proxy.mode = "down"
            time.sleep(3 * config.lease_seconds)  # how long the outage lasts
            proxy.mode = ""
            until(lambda: list_steps(store, "away")[-1] > before + 20)
            time.sleep(2 * config.lease_seconds)  # a machine that was thought gone would have been left out by now
            store.write(stop_key("away", "one"), b"")
            assert [process.wait(timeout=100) for process in processes] == [0, 0]
        finally:
            for process in processes:
                process.kill()
    assert len(attempts(store, "away")) == 1
