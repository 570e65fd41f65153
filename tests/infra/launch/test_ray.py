"""A real Ray cluster on this machine: two nodes, the Jobs API, supervisors in the bundles of a placement group."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.launch import Launch, LaunchConfig, logs, status, stop, submit
from infra.launch.ray import RayLauncher
from infra.processes import wait_until
from starflow.errors import StarflowError
from starflow.objectstore import ObjectStore
from tests.training.run_helpers import lines
from training.config import TrainConfig


def test_lines_of_one_machine(make_launch: Callable[..., Launch], monkeypatch: pytest.MonkeyPatch) -> None:
    launch = make_launch(on="ray", nodes=2)
    launcher = RayLauncher(launch.launch)
    said = ["waiting", "(Machine pid=7) 0| a", "(Machine pid=8, ip=10.0.0.2) 1| b| c", "1| d", "0| "]
    monkeypatch.setattr(launcher, "_lines", lambda *_: iter(said))
    assert list(launcher.logs(launch, 0, False)) == ["waiting", "a", ""]
    assert list(launcher.logs(launch, 1, False)) == ["waiting", "b| c", "d"]


def test_the_job_is_told_its_plan(make_launch: Callable[..., Launch]) -> None:
    launch = make_launch("x", on="ray", nodes=2, gpus_per_node=4, cluster={"python": "/opt/python"})
    entrypoint = RayLauncher(launch.launch).render(launch)
    assert entrypoint.startswith("/opt/python -m infra.launch.ray_job ")
    plan = json.loads(entrypoint.partition("ray_job ")[2].strip("'"))
    assert (plan["gpus"], plan["command"], plan["environment"]["STARFLOW_NODES"]) == (4, ["x"], "2")


def test_no_cluster_is_one_sentence(make_launch: Callable[..., Launch]) -> None:
    launch = make_launch(on="ray", cluster={"address": "http://127.0.0.1:9"})
    with pytest.raises(StarflowError, match=r"no Ray cluster answers at http://127.0.0.1:9: .*set cluster.address"):
        RayLauncher(launch.launch).submit(launch)


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture
def dashboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a cluster of two nodes with two CPUs each, without authentication."""
    port, board, *more = free_ports(4)
    folder = tempfile.mkdtemp(prefix="ray")  # the paths of its sockets must be short
    environment = {
        **os.environ,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
    }
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    common = ["--num-cpus=2", "--num-gpus=0", "--object-store-memory=80000000", "--block", "--disable-usage-stats"]
    ray = [str(Path(sys.executable).with_name("ray")), "start"]
    head = [*ray, "--head", "--node-ip-address=127.0.0.1", f"--port={port}", f"--dashboard-port={board}"]
    head += ["--include-dashboard=true", f"--dashboard-agent-listen-port={more[0]}", f"--temp-dir={folder}"]
    second = [*ray, f"--address=127.0.0.1:{port}", "--node-ip-address=127.0.0.1"]
    second += [f"--dashboard-agent-listen-port={more[1]}"]
    log = (tmp_path / "ray.log").open("w")
    processes = [subprocess.Popen([*head, *common], env=environment, stdout=log, stderr=log)]
    try:
        assert wait_until(lambda: answers(board), seconds=120), (tmp_path / "ray.log").read_text()
        processes.append(subprocess.Popen([*second, *common], env=environment, stdout=log, stderr=log))
        yield f"http://127.0.0.1:{board}"
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(60)
        log.close()
        shutil.rmtree(folder)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_run_on_a_cluster(
    dashboard: str, make_config: Callable[..., TrainConfig], store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(steps=3000, checkpoint_every=10, validation_every=3000, ranks=2)
    target = LaunchConfig.model_validate({"on": "ray", "nodes": 2, "cluster": {"address": dashboard}})
    launch = submit(config, target)
    try:
        assert wait_until(lambda: (status(launch)["step"] or 0) >= 10, seconds=250), list(logs(launch))
        assert status(launch)["state"] == "running"
        assert {node["state"] for node in status(launch)["nodes"]} == {"running"}
        answer = stop(launch, 60)
        assert (answer["state"], answer["alive"]) == ("preempted", False)
        reached = answer["step"]
        launch = submit(config.model_copy(update={"steps": reached + 2}), target)
        said = list(logs(launch, follow=True))
        assert any("2 ranks on 2 of 2 machines" in line and f"from step {reached}" in line for line in said)
        assert wait_until(lambda: not status(launch)["alive"], seconds=60)
        assert status(launch)["state"] == "completed"
    finally:
        stop(launch, 0)
    found: Any = lines(store, "test")
    assert [line["step"] for line in found] == list(range(1, reached + 3))
