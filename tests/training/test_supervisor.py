"""What the supervisor settles before it starts anything."""

from __future__ import annotations

import pytest

from starflow.errors import ConfigError, NotFoundError
from training.cluster import Place
from training.lease import Lease
from training.record import resolve
from training.run_commands import describe_run
from training.supervisor import Supervisor


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
