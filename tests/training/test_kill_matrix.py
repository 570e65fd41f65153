"""SIGKILL of a rank, all ranks, an uploader or the supervisor, at random moments and in each phase of a save.

Whatever was committed stays, and the run ends with the weights, moments and metric lines of one nobody disturbed.
"""

from __future__ import annotations

import contextlib
import os
import random
import time

import psutil
import pytest
import torch

from starflow.checkpoints import list_steps, load_manifest, verify
from starflow.objectstore import open_store
from tests.faulty_s3 import FaultyS3
from tests.training.one_rank import Setup
from tests.training.run_helpers import command, lines, ranks_of, tensors, train, until
from tests.training.small_snapshot import publish_samples
from training.checkpoint import Snapshot
from training.lease import Lease
from training.resume import resume

KINDS = ("rank", "all ranks", "uploader", "supervisor")
MOMENTS = 30
STEPS = 1800


def kill(kind, config, process, choose):
    """SIGKILLs what `kind` says of a running attempt; returns how many processes."""
    if kind == "supervisor":
        process.kill()
        process.wait()
        return 1
    victims = []
    for pid in ranks_of(config).values():
        with contextlib.suppress(psutil.NoSuchProcess):  # an attempt before has left its number
            rank = psutil.Process(pid)
            victims += rank.children() if kind == "uploader" else [rank]
    if kind == "uploader":
        victims = victims[:1]
    elif kind == "rank":
        victims = [choose.choice(victims)] if victims else []
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    return len(victims)


class Guarded:
    """`starflow train` of one run, started again when its supervisor is gone; what was committed must stay."""

    def __init__(self, config, store, tmp_path):
        self.config, self.store, self.tmp_path = config, store, tmp_path
        self.process = command(config, tmp_path)
        self.committed = {}

    def check(self):
        """Every manifest seen so far is still the same."""
        for step in list_steps(self.store, self.config.run):
            key = f"runs/{self.config.run}/checkpoints/{step:09d}.json"
            assert self.committed.setdefault(step, self.store.read(key)) == self.store.read(key)
        assert set(self.committed) <= set(list_steps(self.store, self.config.run))

    def kill(self, kind, choose):
        if kill(kind, self.config, self.process, choose) and kind == "supervisor":
            self.process = command(self.config, self.tmp_path)
        self.check()

    def finish(self, seconds):
        assert self.process.wait(timeout=seconds) == 0
        self.check()

    def newest(self):
        steps = list_steps(self.store, self.config.run)
        return steps[-1] if steps else 0


def assert_alike(store, steps):
    assert tensors(store, "killed", steps) == tensors(store, "calm", steps)
    assert lines(store, "killed") == lines(store, "calm")
    for step in list_steps(store, "killed"):
        verify(store, load_manifest(store, "killed", step))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_thirty_random_moments(make_config, store, tmp_path):
    choose = random.Random(5)
    calm = make_config(run="calm", steps=STEPS, checkpoint_every=10, keep_newest=STEPS, max_restarts=99)
    killed = calm.model_copy(update={"run": "killed"})
    assert train(calm, tmp_path, 900) == 0
    run = Guarded(killed, store, tmp_path)
    done = []
    for number in range(MOMENTS):
        kind = KINDS[number % len(KINDS)]
        before, starting = run.newest(), choose.random() < 0.2
        moment = time.monotonic() + choose.uniform(0, 10) if starting else float("inf")
        until(lambda before=before, end=moment: run.newest() > before or time.monotonic() > end, 300)
        if not starting:  # while it trains and saves
            time.sleep(choose.uniform(0, 0.4))
        if run.process.poll() is None:
            run.kill(kind, choose)
            done.append(kind)
    assert len(done) == MOMENTS, f"the run was over after {len(done)} kills; raise STEPS"
    run.finish(1200)
    assert_alike(store, STEPS)


#: Phase of a save: the request to the store in whose middle the kill comes, and how many like it come before.
PHASES = {
    "upload": ("hang", "^PUT .*/killed/shards/.*optimizer", 0),
    "metrics": ("hang", "^PUT .*/killed/shards/.*metrics", 0),
    "before the announcement": ("lost", "^PUT .*/killed/shards/.*manifest", 0),
    "before the manifest": ("hang", "^PUT .*/killed/checkpoints/", 0),
    "after the manifest": ("lost", "^PUT .*/killed/checkpoints/", 0),
    "prune manifests": ("lost", "^POST .*delete", 1),  # the draft goes first
    "prune data": ("hang", "^POST .*delete", 2),
}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_each_phase_of_a_save(make_config, s3_url, monkeypatch, tmp_path):
    choose = random.Random(6)
    with FaultyS3(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        store = open_store(s3_url)
        publish_samples(store)
        values = {"store": s3_url, "steps": STEPS, "checkpoint_every": 5, "max_restarts": 99, "keep_newest": 2}
        calm = make_config(run="calm", **values)
        assert train(calm, tmp_path, 900) == 0
        run = Guarded(calm.model_copy(update={"run": "killed"}), store, tmp_path)
        for mode, only, after in PHASES.values():
            for kind in KINDS:
                before = run.newest()
                until(lambda before=before: run.newest() > before, 300)
                proxy.only, proxy.count, proxy.after = only, 1, after
                proxy.mode = mode
                until(lambda: proxy.struck, 100)
                kill(kind, run.config, run.process, choose)
                proxy.mode = ""
                if kind == "supervisor":
                    run.process = command(run.config, tmp_path)
                newest = run.newest()
                assert newest >= before
                verify(store, load_manifest(store, "killed", newest))
        assert run.process.poll() is None, "the run was over before the last phase; raise STEPS"
        assert run.process.wait(timeout=1200) == 0
        assert_alike(store, STEPS)


def test_killed_in_the_middle_of_the_copy(one_rank, make_config, store, tmp_path):
    """That phase is over in milliseconds, so the copy itself breaks off half-way."""
    metrics = tmp_path / "metrics.jsonl"
    metrics.touch()
    Lease(store, "test", "tester:1:1", seconds=600).acquire()
    setup = Setup(make_config(ranks=1))
    setup.train(2)
    assert setup.save(2, metrics) == ""
    state = setup.state()
    setup.train(1)

    def half(snapshot):
        for target, source in snapshot._pairs[: len(snapshot._pairs) // 2]:
            target.copy_(source)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Snapshot, "copy", half)
        with pytest.raises(KeyboardInterrupt):
            setup.save(3, metrics)
    other = Setup(make_config(ranks=1), seed=5)
    assert resume(store, other.config, other.engine, other.ema).step == 2
    assert all(torch.equal(a, b) for a, b in zip(other.state(), state, strict=True))
    setup.saver.close()
