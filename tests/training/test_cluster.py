import os
import signal

import pytest

from starflow.checkpoints import list_steps
from starflow.errors import ConfigError
from tests.training.run_helpers import command, ranks_of, tensors, train, until
from training.cluster import Place, place_from_environment


def environment(node, port=4000):
    return {
        "STARFLOW_NODES": "2",
        "STARFLOW_NODE_RANK": str(node),
        "STARFLOW_RENDEZVOUS": f"127.0.0.1:{port}",
        "STARFLOW_LAUNCH": "one",
    }


def test_place():
    assert place_from_environment({}) == Place()
    place = place_from_environment(environment(1))
    assert (place.node, place.host, place.share(8)) == (1, "127.0.0.1", 4)
    assert place.torchrun(3) == [
        "--nnodes",
        "2",
        "--node-rank",
        "1",
        "--master-addr",
        "127.0.0.1",
        "--master-port",
        "4003",
    ]
    with pytest.raises(ConfigError, match="ranks 3 do not divide over 2"):
        place.share(3)
    with pytest.raises(ConfigError, match="STARFLOW_LAUNCH is not set"):
        place_from_environment({k: v for k, v in environment(1).items() if k != "STARFLOW_LAUNCH"})
    with pytest.raises(ConfigError, match="host:port"):
        place_from_environment(environment(1) | {"STARFLOW_RENDEZVOUS": "somewhere"})


@pytest.mark.slow
def test_two_machines_lose_a_rank_and_go_on(make_config, store, tmp_path, free_port):
    """Two supervisors with a cache of their own stand for two machines."""
    calm = make_config(run="calm", steps=60, checkpoint_every=10)
    assert train(calm, tmp_path) == 0
    config = calm.model_copy(update={"run": "two"})
    other = config.model_copy(update={"cache": tmp_path / "other-cache"})
    (tmp_path / "other-cache").mkdir()
    os.symlink(config.cache / "null-captions", other.cache / "null-captions")
    first = command(config, tmp_path, environment(0, free_port))
    second = command(other, tmp_path, environment(1, free_port), name="second")
    try:
        until(lambda: list_steps(store, "two"))
        os.kill(ranks_of(other)[1], signal.SIGKILL)
        assert first.wait(timeout=200) == 0
        assert second.wait(timeout=60) == 0
    finally:
        first.terminate()
        second.terminate()
    assert tensors(store, "two", 60) == tensors(store, "calm", 60)
