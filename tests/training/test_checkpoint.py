"""Saves and resumes of one rank in this process: layout, a dying uploader, a failing store, another run's state."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load

from starflow import manifest
from starflow.checkpoints import list_steps, load_manifest, read_weights
from starflow.errors import ConfigError, CorruptError, StoreError, UnavailableError
from tests.training.one_rank import Setup
from training.checkpoint import Snapshot
from training.lease import Lease
from training.resume import resume

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    return path


@pytest.fixture
def saved(make_config, store, metrics):
    """A run with checkpoints 2 and 4."""
    Lease(store, "test", "tester:1:1", seconds=600).acquire()
    setup = Setup(make_config(ranks=1))
    for step in (2, 4):
        setup.train(2)
        assert setup.save(step, metrics) == ""
    yield setup
    setup.saver.close()


def same(state, other):
    """Bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(state, other, strict=True))


def test_memory_holds_safetensors_files():
    tensors = {"a@0": torch.arange(5.0), "b@3": torch.ones(7)}
    snapshot = Snapshot({"weights": tensors, "optimizer": {"r": torch.arange(9, dtype=torch.uint8)}})
    tensors["a@0"] += 1
    snapshot.copy()
    for kind, expected in (("weights", tensors), ("optimizer", {"r": torch.arange(9, dtype=torch.uint8)})):
        offset, size = snapshot.ranges[kind]
        found = load(os.pread(snapshot.descriptor, size, offset))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    snapshot.close()


def test_saved_state_is_read_back_exactly(saved, make_config, store):
    checkpoint = load_manifest(store, "test")
    assert (checkpoint.step, checkpoint.progress.optimizer_steps) == (4, 4)
    live = {name: parameter.detach() for name, parameter in saved.engine.flow.named_parameters()}
    stored = read_weights(store, checkpoint, "weights")
    assert stored.keys() == live.keys()
    assert all(torch.equal(stored[name], live[name]) for name in live)

    other = Setup(make_config(ranks=1, zero_stage=1), seed=5)
    assert resume(store, other.config, other.engine, other.ema).step == 4
    assert all(torch.equal(a, b) for a, b in zip(other.state(), saved.state(), strict=True))
    saved.train(2)
    other.train(2)
    assert all(torch.equal(a, b) for a, b in zip(other.state(), saved.state(), strict=True))


@pytest.mark.parametrize("precision", ["bfloat16", "autocast"])
def test_other_precisions_learn_alike_and_go_on_exactly(make_config, store, metrics, precision):
    Lease(store, "test", "tester:1:1", seconds=600).acquire()
    setup = Setup(make_config(ranks=1, precision=precision))
    plain = Setup(make_config(ranks=1))
    start = plain.state()
    for each in (setup, plain):
        each.train(8)
    moved, wanted = (
        torch.cat([(a - b).flatten() for a, b in zip(each.state(), start, strict=True)]) for each in (setup, plain)
    )
    assert torch.cosine_similarity(moved, wanted, dim=0) > 0.9
    assert setup.save(8, metrics) == ""
    other = Setup(setup.config, seed=5)
    assert resume(store, other.config, other.engine, other.ema).step == 8
    assert same(other.state(), setup.state())
    for each in (setup, other):
        each.train(2)
    assert same(other.state(), setup.state())
    setup.saver.close()


def test_a_killed_uploader_is_replaced(saved, store, metrics):
    os.kill(saved.saver._uploader.pid, signal.SIGKILL)
    assert saved.save(6, metrics) == ""
    stopped = saved.saver._uploader.pid
    os.kill(stopped, signal.SIGSTOP)  # so that the kill comes while it works
    threading.Timer(0.5, os.kill, (stopped, signal.SIGKILL)).start()
    assert saved.save(8, metrics) == ""
    assert load_manifest(store, "test").step == 8


def test_a_run_taken_over_by_another_writer_commits_nothing(saved, store, metrics):
    Lease(store, "test", "tester:1:1").release()
    Lease(store, "test", "somebody:2:2").acquire()
    assert "taken over by process 2 on somebody" in saved.save(6, metrics)
    assert saved.saver.failures == 1
    assert load_manifest(store, "test").step == 4


def test_a_rank_that_is_lost_during_the_last_save_is_no_failed_save(saved, store, metrics, monkeypatch):
    def lose(*args, **kwargs):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr("training.checkpoint.dist.all_gather_object", lose)
    with pytest.raises(RuntimeError, match="lost while saving step 6: Connection closed"):  # which is tried again
        saved.save(6, metrics)
    assert saved.saver.failures == 0
    assert load_manifest(store, "test").step == 4


def test_a_resume_that_was_killed_has_kept_what_it_had_fetched(saved, make_config, store, monkeypatch):
    other, fetched, fetch = Setup(make_config(ranks=1), seed=5), [], manifest.download

    def download(store, ref, path):
        if len(fetched) == 2:
            raise UnavailableError("the store is away")
        fetched.append(path.name)
        fetch(store, ref, path)

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "download", download)
        with pytest.raises(UnavailableError):
            resume(store, other.config, other.engine, other.ema)
    folder = other.config.folder / "resume" / "0"
    (folder / fetched[1]).write_bytes(b"lost its content when the power went")
    (folder / "ema-00001.safetensors").write_bytes(b"of another checkpoint")
    again = []
    monkeypatch.setattr(manifest, "download", lambda *args: (again.append(args[2].name), fetch(*args)))
    assert resume(store, other.config, other.engine, other.ema).step == 4
    assert same(other.state(), saved.state())
    assert fetched[0] not in again
    assert fetched[1] in again


def test_a_disk_that_cached_shards_fill_has_room_for_a_resume(saved, make_config, store, monkeypatch):
    other, fetch = Setup(make_config(ranks=1), seed=5), manifest.download
    shards = other.config.shard_cache
    needed = max(ref.size for _, ref in load_manifest(store, "test", 4).shards[0])
    for number in range(3):
        shards.open(f"{number}-shard", lambda path: path.write_bytes(bytes(needed))).close()

    def download(store, ref, path):
        if shards.holds(room):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        fetch(store, ref, path)

    monkeypatch.setattr(manifest, "download", download)
    room = "1-shard"
    assert resume(store, other.config, other.engine, other.ema).step == 4
    assert [shards.holds(f"{number}-shard") for number in range(3)] == [False, False, True]
    room = "../runs"  # something else fills the disk
    with pytest.raises(OSError, match="No space left"):
        resume(store, other.config, other.engine, other.ema)


def test_shards_that_another_run_maps_are_waited_for_before_more_go(saved, make_config, store, monkeypatch):
    other, fetch, slept = Setup(make_config(ranks=1), seed=5), manifest.download, []
    needed = max(ref.size for _, ref in load_manifest(store, "test", 4).shards[0])
    for number in range(10):
        other.config.shard_cache.open(f"{number}-shard", lambda path: path.write_bytes(bytes(needed))).close()

    def download(store, ref, path):
        if not any(slept):  # the other run has not closed its maps yet
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        fetch(store, ref, path)

    monkeypatch.setattr(manifest, "download", download)
    monkeypatch.setattr("training.resume.time", SimpleNamespace(sleep=slept.append))
    assert resume(store, other.config, other.engine, other.ema).step == 4
    assert sum(other.config.shard_cache.holds(f"{number}-shard") for number in range(10)) == 8


def test_the_last_shard_that_another_run_maps_is_waited_for(saved, make_config, store, monkeypatch):
    other, fetch, slept = Setup(make_config(ranks=1), seed=5), manifest.download, []
    other.config.shard_cache.open("shard", lambda path: path.write_bytes(bytes(100))).close()

    def download(store, ref, path):
        if sum(slept) < 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        fetch(store, ref, path)

    monkeypatch.setattr(manifest, "download", download)
    monkeypatch.setattr("training.resume.time", SimpleNamespace(sleep=slept.append))
    assert resume(store, other.config, other.engine, other.ema).step == 4
    assert slept == [0.0, 0.5, 1.0]


def test_missing_objects_fall_back_and_nothing_left_moves_nothing(saved, make_config, store):
    newest, oldest = load_manifest(store, "test", 4).shards[0].optimizer.key, load_manifest(store, "test", 2)
    data = {key: store.read(key) for key in (newest, oldest.shards[0].ema.key)}
    store.delete(data)
    other = Setup(make_config(ranks=1), seed=5)
    with pytest.raises(CorruptError, match=r"none verifies \(2, 4; of 4: .*optimizer-00000.* does not exist"):
        resume(store, other.config, other.engine, other.ema)
    assert list_steps(store, "test") == [2, 4]  # once one is restored, as the error asks, the run goes on from it
    store.write(oldest.shards[0].ema.key, data[oldest.shards[0].ema.key])
    assert resume(store, other.config, other.engine, other.ema).step == 2
    assert list_steps(store, "test") == [2]
    assert store.head("runs/test/bad/000000004.json")


def test_a_checkpoint_of_a_release_with_other_fields_is_refused_and_stays(saved, make_config, store):
    key = "runs/test/checkpoints/000000004.json"
    body = json.loads(store.read(key))
    store.write(key, json.dumps(body | {"code": "9.9", "more": 1}).encode())
    other = Setup(make_config(ranks=1), seed=5)
    with pytest.raises(StoreError, match=r"000000004.json.*more.*release 9\.9"):
        resume(store, other.config, other.engine, other.ema)
    assert list_steps(store, "test") == [2, 4]


@pytest.mark.parametrize(
    ("values", "message"),
    [({"model": {"layers": [1, 2]}}, r"layers = \[1, 1\].*asks for \[1, 2\]"), ({"seed": 3}, "seed=0.*seed=3")],
)
def test_another_model_or_configuration_is_refused(saved, make_config, store, values, message):
    other = Setup(make_config(ranks=1, **values))
    with pytest.raises(ConfigError, match=message):
        resume(store, other.config, other.engine, other.ema)


def test_a_newer_format_is_refused_by_name(saved, make_config, store):
    body = {"step": 9}
    manifest.commit(store, "runs/test/checkpoints/000000009.json", "checkpoint", 99, body)
    other = Setup(make_config(ranks=1))
    with pytest.raises(Exception, match="schema version 99"):
        resume(store, other.config, other.engine, other.ema)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_spikes_and_nans_leave_weights_and_moments_alone(make_config, stage):
    setup = Setup(make_config(ranks=1, zero_stage=stage))
    setup.train(2)
    before = setup.state()
    batch = (torch.randn(8, 4, 8, 8), torch.zeros(8, 6, 24))
    setup.engine.norm_limit = 1e-9
    setup.engine.backward([batch])
    spike = setup.engine.step(1e-3)
    setup.engine.norm_limit = float("inf")
    bad = batch[0].clone()
    bad[3, 0, 0, 0] = float("nan")
    loss, _ = setup.engine.backward([(bad, batch[1])])
    skipped = setup.engine.step(1e-3, skip=bool(loss.isnan()))
    assert not spike.applied
    assert not skipped.applied
    assert spike.grad_norm > 1e-9
    assert all(torch.equal(a, b) for a, b in zip(setup.state(), before, strict=True))
    setup.engine.backward([batch])
    assert setup.engine.step(1e-3).applied


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_gradients_that_overflow_under_a_finite_loss_are_skipped_from_the_first_step(make_config, stage):
    setup = Setup(make_config(ranks=1, zero_stage=stage))
    before = setup.state()
    parameter = next(setup.engine.flow.parameters())
    hook = parameter.register_hook(lambda gradient: torch.full_like(gradient, math.inf))
    loss, _ = setup.engine.backward([(torch.randn(8, 4, 8, 8), torch.zeros(8, 6, 24))])
    hook.remove()
    assert math.isfinite(loss)
    assert not setup.engine.step(1e-3).applied  # before there is a usual norm, with no limit
    assert same(setup.state(), before)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_to_cpu_and_disk_changes_nothing(make_config, store, metrics, tmp_path, stage):
    Lease(store, "test", "tester:1:1", seconds=600).acquire()
    plain = Setup(make_config(ranks=1, zero_stage=stage))
    plain.train(2)
    plain.train(1)
    for offload in ("cpu", "nvme"):
        config = make_config(ranks=1, zero_stage=stage, offload=offload, nvme_path=tmp_path / "nvme")
        setup = Setup(config)
        setup.train(2)
        assert setup.save(2, metrics) == ""
        setup.saver.close()
        other = Setup(config, seed=5)
        assert resume(store, config, other.engine, other.ema).step == 2
        assert same(other.state(), setup.state())
        setup.train(1)
        other.train(1)
        assert same(setup.state(), plain.state())
        assert same(other.state(), plain.state())
        store.delete(["runs/test/checkpoints/000000002.json"])
    assert list((tmp_path / "nvme").iterdir()) == []  # nothing is left behind


def test_a_disk_without_room_for_the_optimizer_is_named(make_config, tmp_path):
    (tmp_path / "nvme").write_text("no folder")
    with pytest.raises(ConfigError, match=r"nvme_path .*/nvme does not take \d+ bytes"):
        Setup(make_config(ranks=1, offload="nvme", nvme_path=tmp_path / "nvme"))
