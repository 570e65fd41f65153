"""What a rank says when it fails."""

from __future__ import annotations

import errno
import os
import threading

import pytest

from starflow.cache import FileCache
from starflow.errors import ConfigError, StoreError
from starflow.snapshots import load_snapshot
from training import worker
from training.launch import Attempt
from training.metrics import MetricsLog
from training.record import resolve
from training.worker import failure, open_reader


@pytest.fixture
def attempt(make_config, tmp_path):
    return Attempt(config=make_config(), owner="tester:1:1", folder=tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_and_not_tried_again(attempt, tmp_path, monkeypatch, number):
    monkeypatch.setattr("starflow.cache.PAUSES", (0.0,))
    report = failure(OSError(number, os.strerror(number), "/scratch/x"), attempt, 0)
    assert not report.retry
    assert report.reason.startswith(f"cannot write to /scratch/x: {os.strerror(number)}; free space there")

    def fill(path):
        raise OSError(number, os.strerror(number))

    with pytest.raises(StoreError) as error:
        FileCache(tmp_path / "cache").open("shard", fill)
    report = failure(error.value, attempt, 0)
    assert not report.retry
    assert f"cache {tmp_path / 'cache'} cannot take shard: {os.strerror(number)}" in report.reason


def test_a_log_on_a_full_disk_is_named(attempt):
    config = attempt.config
    config.folder.mkdir(parents=True)
    (config.folder / "metrics.jsonl").symlink_to("/dev/full")
    log = MetricsLog(config)
    with pytest.raises(OSError, match="No space") as error:
        log.write({"step": 1})
    report = failure(error.value, attempt, 0)
    assert not report.retry
    assert f"cannot write to {config.folder}: No space left" in report.reason


def test_the_cache_is_as_large_as_configured(make_config, store, tmp_path):
    config = make_config(cache=tmp_path, cache_gib=0.5)
    reader = open_reader(store, load_snapshot(store), config)
    assert (reader.cache.directory, reader.cache.limit) == (tmp_path / "snapshots", 2**29)


def test_a_rank_gives_signs_of_life_while_it_waits_for_one_that_fetches(attempt, store, monkeypatch):
    """Until it has resumed."""
    beating = []

    class Waits:
        fragments = ()

        def __init__(self, *_):
            beating.append("heart" in [thread.name for thread in threading.enumerate()])

    def last(*_):
        Waits()
        raise ConfigError("as far as this goes")

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(worker.signal, "signal", lambda *_: None)
    monkeypatch.setattr(worker.dist, "barrier", Waits)
    monkeypatch.setattr(worker, "Engine", Waits)
    monkeypatch.setattr(worker, "EMA", Waits)
    monkeypatch.setattr(worker, "resume", last)
    rank = worker.Rank(attempt.model_copy(update={"config": resolve(store, attempt.config)}))
    with pytest.raises(ConfigError, match="as far as this goes"):
        rank._train(store)
    assert beating == 4 * [True]


def test_what_may_go_away_is_tried_again(attempt, tmp_path):
    assert failure(StoreError("the store is away"), attempt, 0).retry
    assert not failure(ConfigError("wrong"), attempt, 0).retry
    report = failure(RuntimeError("a peer is gone"), attempt, 1)
    assert report.retry
    assert "RuntimeError: a peer is gone" in report.reason
    assert "a peer is gone" in (tmp_path / "error-1.txt").read_text()
