"""What the supervisor settles before it starts anything."""

from __future__ import annotations

import threading
import time

import pytest

from starflow.checkpoints import checkpoint_key
from starflow.errors import ConfigError, NotFoundError, UnavailableError
from starflow.snapshots import snapshot_key
from tests.training.small_snapshot import publish_more, save_checkpoint
from training import supervisor as supervisor_module
from training.cluster import Place
from training.crew import End
from training.lease import Announced, Lease
from training.record import own_snapshot, resolve
from training.run_commands import describe_run
from training.supervisor import Supervisor
from training.train_command import dry_run_plan


@pytest.mark.parametrize(
    ("values", "message"),
    [({"model": {"foo": 1}}, "model.foo is not"), ({"model": {"channels": 3}}, "latents of 4 channels")],
)
def test_a_wrong_first_start_leaves_nothing(make_config, store, values, message):
    with pytest.raises(ConfigError, match=message):
        resolve(store, make_config(**values))
    with pytest.raises(NotFoundError):
        resolve(store, make_config(snapshot="9"))
    assert not list(store.list("runs/"))


def test_a_run_without_steps_takes_a_new_configuration(make_config, store):
    snapshot = resolve(store, make_config(text_encoder="nowhere")).snapshot
    with pytest.raises(ConfigError, match=r"model.foo"):  # a worse one does not replace it
        resolve(store, make_config(model={"foo": 1}))
    assert describe_run(store.url, "test")["config"]["text_encoder"] == "nowhere"
    assert resolve(store, make_config(seed=1)).snapshot == snapshot
    config = describe_run(store.url, "test")["config"]
    assert (config["text_encoder"], config["seed"]) == ("test-text", 1)
    assert Lease(store, "test", "").holder() is None


def test_a_run_that_is_under_way_keeps_its_configuration(make_config, store):
    resolve(store, make_config())
    lease = Lease(store, "test", "elsewhere:1:1", seconds=60)
    lease.acquire()
    with pytest.raises(ConfigError, match="started with seed=0"):
        resolve(store, make_config(seed=1))
    lease.release()
    store.write("runs/test/checkpoints/000000002.json", b"{}")
    with pytest.raises(ConfigError, match="started with seed=0"):
        resolve(store, make_config(seed=1))


def test_a_run_stays_on_the_snapshot_that_it_was_started_with(make_config, store):
    first, second = resolve(store, make_config()).snapshot, publish_more(store).id
    assert resolve(store, make_config(snapshot="2")).snapshot == second  # without a step it takes another one
    assert describe_run(store.url, "test")["snapshot"] == second
    assert resolve(store, make_config(snapshot="1")).snapshot == first
    store.write("runs/test/checkpoints/000000002.json", b"{}")
    for name in ("newest", "1", first):
        assert resolve(store, make_config(snapshot=name)).snapshot == first
    with pytest.raises(ConfigError, match=rf"snapshot={first}, .* snapshot={second}; .*init_from={store.url}/test"):
        resolve(store, make_config(snapshot="2"))


def test_what_a_checkpoint_was_written_with_counts_more_than_what_the_run_began_with(make_config, store):
    first, second = resolve(store, make_config()).snapshot, publish_more(store).id
    save_checkpoint(store, make_config(snapshot=second, steps=9), 4)
    assert resolve(store, make_config()).snapshot == second
    with pytest.raises(ConfigError, match=f"started with snapshot={second}"):
        resolve(store, make_config(snapshot=first))
    assert {key: describe_run(store.url, "test")[key] for key in ("snapshot", "steps")} == {
        "snapshot": second, "steps": 9
    }  # fmt: skip


def test_a_run_whose_snapshot_is_gone_is_told_how_to_go_on(make_config, store):
    first = resolve(store, make_config()).snapshot
    save_checkpoint(store, make_config(snapshot=first), 4)
    publish_more(store)
    store.delete([snapshot_key(1)])
    config = resolve(store, make_config())
    for ask in (lambda: own_snapshot(store, config), lambda: dry_run_plan(make_config())):
        with pytest.raises(ConfigError, match=rf"snapshot {first}, .* not hold any more; .*init_from={store.url}/test"):
            ask()


def test_a_machine_waits_while_another_one_records_the_new_configuration(make_config, store):
    resolve(store, make_config())
    other = Lease(store, "test", "elsewhere:1:1")
    other.acquire()
    release = threading.Timer(0.5, other.release)
    release.start()
    assert resolve(store, make_config(seed=1)).seed == 1
    release.join()


def test_a_start_that_was_replaced_before_it_had_the_lease_stops(make_config, store):
    early = Supervisor(make_config())
    resolve(store, make_config(seed=1))
    with pytest.raises(ConfigError, match="started with seed=1"):
        early.run()
    assert Lease(store, "test", "").holder() is None


def test_a_machine_without_its_gpus_trains_nothing(make_config, store):
    assert Supervisor(make_config(), Place(launch="one", gpus=4096)).run() == "failed"
    message = describe_run(store.url, "test")["events"][-1]["message"]
    assert "GPUs, 4096 are needed" in message


def test_an_unusable_cache_ends_the_run_with_the_remedy(make_config, store, tmp_path):
    (tmp_path / "file").write_text("no folder")
    assert Supervisor(make_config(cache=tmp_path / "file")).run() == "failed"
    message = describe_run(store.url, "test")["events"][-1]["message"]
    assert f"cannot write to {tmp_path / 'file'}" in message
    assert "set cache=" in message


def test_a_checkpoint_whose_uploader_was_killed_is_there_before_the_next_attempt(make_config, store, monkeypatch):
    begun = []

    def attempt(self, committed):
        begun.append(committed)
        if committed is None:
            store.write("runs/test/shards/000000002-x/manifest.json", b"{}")
            announced = Announced(key=checkpoint_key("test", 2), draft="runs/test/shards/000000002-x/manifest.json")
            Lease(store, "test", self.owner)._announce(announced)
            return End("failed", "the uploader was killed before the manifest")
        return End("completed", "completed")

    monkeypatch.setattr(Supervisor, "_attempt", attempt)
    assert Supervisor(make_config()).run() == "completed"
    assert begun == [None, 2]


@pytest.mark.parametrize("stopping", [False, True])
def test_a_stop_does_not_wait_for_a_store_that_is_away(make_config, monkeypatch, stopping):
    supervisor, asked = Supervisor(make_config()), []

    def away(*_):
        asked.append(time.monotonic())
        if stopping:
            supervisor._stop.set()
        elif len(asked) == 3:
            return
        raise UnavailableError("away")

    monkeypatch.setattr(supervisor.lease, "acquire", away)
    monkeypatch.setattr(supervisor, "_lead", lambda: "completed")
    assert supervisor.run() == ("preempted" if stopping else "completed")
    assert len(asked) == (1 if stopping else 3)


def test_a_stop_while_another_one_still_writes_the_run_is_no_failure(make_config, store):
    supervisor = Supervisor(make_config())
    Lease(store, "test", "elsewhere:1:1", seconds=60).acquire()
    stop = threading.Timer(0.3, supervisor._stop.set)
    stop.start()
    assert supervisor.run() == "preempted"
    stop.join()


def test_a_store_that_stays_away_is_said(make_config, monkeypatch):
    supervisor = Supervisor(make_config())

    def away(*_):
        raise UnavailableError("away")

    monkeypatch.setattr(supervisor_module, "STORE_AWAY", 0.2)
    monkeypatch.setattr(supervisor.lease, "acquire", away)
    with pytest.raises(UnavailableError, match="away"):
        supervisor.run()


def test_an_outage_is_told_once_and_so_is_its_end(make_config, monkeypatch, capsys):
    supervisor, answers, done = Supervisor(make_config(lease_seconds=0.1)), iter([0, 1, 1, 1, 0, 0]), threading.Event()

    def renew():
        answer = next(answers, None)
        if answer is None:
            done.set()
        if answer:
            raise UnavailableError("it is away")

    monkeypatch.setattr(supervisor.lease, "renew", renew)
    supervisor._renew(done)
    told = capsys.readouterr().err
    assert told.count("the store does not answer") == told.count("the store answers again") == 1
