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
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar, cast
from unittest.mock import MagicMock

import pytest

from infra.launch import Launch, LaunchConfig, logs, status, stop, submit
from infra.launch.ray import RayLauncher
from infra.launch.ray_job import MOST_RESTARTS, Job, Restarts
from infra.processes import wait_until
from starflow.errors import UNAVAILABLE_STATUS, StarflowError, UnavailableError
from starflow.objectstore import ObjectStore
from tests.training.run_helpers import lines
from training.config import TrainConfig
from training.launch import PREEMPTED_STATUS


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


class Forgetful:
    """A cluster that was started anew: what it says of a job is what Ray's client makes of a 404."""

    asked: ClassVar[list[str]] = []

    def __init__(self, address: str) -> None:
        self.asked.append(address)

    def get_job_info(self, job: str) -> None:
        raise RuntimeError(f"Request failed with status code 404: Job {job} does not exist.")

    def stop_job(self, job: str) -> None:
        raise RuntimeError("Request failed with status code 500: no head.")


def test_a_cluster_started_anew_keeps_no_run_from_being_launched(
    make_launch: Callable[..., Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", Forgetful)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://another:8265")
    launch = make_launch(on="ray", nodes=2).model_copy(update={"handle": {"address": "http://head:8265"}})
    launcher = RayLauncher(launch.launch)
    nodes = launcher.nodes(launch)
    assert {(node.state, node.detail.partition(": ")[2]) for node in nodes} == {("ended", "unknown to the cluster")}
    with pytest.raises(StarflowError, match=r"Ray cluster at http://head:8265 refuses: .*500: no head"):
        launcher.stop(launch, force=True)
    assert Forgetful.asked == ["http://head:8265"] * 2, "where it was submitted, not where one would submit now"


def test_restarts_wait_longer_each_time_until_the_run_goes_on() -> None:
    step: list[int | None] = [7]
    restarts = Restarts(lambda: step[0])
    waits = [restarts.wait(0) for _ in range(MOST_RESTARTS + 1)]
    assert waits[:4] == [1, 2, 4, 8]
    assert waits[-2:] == [60, None]
    assert restarts.wait(1) == 1
    step[0] = None  # a store that does not answer shows no progress
    assert restarts.wait(0) is None
    step[0] = 8
    assert restarts.wait(0) == 1


class HereOnly(Job):
    """A job whose machines leave at once, with the statuses given; the last one for ever."""

    def __init__(self, plan: dict[str, Any], *statuses: int) -> None:
        super().__init__(plan)
        self.statuses, self.started = list(statuses), 0

    def _start(self, group: Any, node: int) -> None:
        self.started += 1
        done: Future[int] = Future()
        done.set_result(self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0])
        self._machines[node], self._running[done] = MagicMock(), node


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., HereOnly]:
    monkeypatch.setattr("infra.launch.ray_job.LONGEST_WAIT", 0.01)
    monkeypatch.setattr("infra.launch.ray_job.LOOK_EVERY", 0.01)
    monkeypatch.setattr("ray.wait", lambda references, timeout: ([r for r in references if r.done()], []))
    monkeypatch.setattr("ray.get", lambda reference: reference.result())
    environment = {"STARFLOW_NODES": "1", "STARFLOW_LAUNCH": "l"}
    plan = {"environment": environment, "store": str(tmp_path), "run": "r", "command": [], "cpus": 1, "gpus": 0}

    def make(*statuses: int) -> HereOnly:
        made = HereOnly(plan, *statuses)
        made._start(None, 0)
        return made

    return make


@pytest.mark.parametrize("status", [PREEMPTED_STATUS, UNAVAILABLE_STATUS])
def test_a_machine_that_leaves_again_and_again_is_given_up(job: Callable[..., HereOnly], status: int) -> None:
    made = job(status)
    assert made._watch(cast(Any, None)) == status
    assert made.started == 1 + MOST_RESTARTS


def test_a_machine_starts_again_until_it_is_done(job: Callable[..., HereOnly]) -> None:
    made = job(UNAVAILABLE_STATUS, PREEMPTED_STATUS, 0)
    assert (made._watch(cast(Any, None)), made.started) == (0, 3)
    made = job(UNAVAILABLE_STATUS, 1, 0)
    assert (made._watch(cast(Any, None)), made.started) == (1, 2)


def test_a_job_outlives_a_store_that_is_away(job: Callable[..., HereOnly], monkeypatch: pytest.MonkeyPatch) -> None:
    made, asked = job(UNAVAILABLE_STATUS, 0), [0]

    def away(*_: Any) -> None:
        asked[0] += 1
        raise UnavailableError("the store does not answer")

    monkeypatch.setattr(type(made._store), "head", away)
    monkeypatch.setattr(type(made._store), "list", away)
    assert made._watch(cast(Any, None)) == 0
    assert asked[0] >= 2


def test_nothing_starts_again_after_the_request_to_stop(job: Callable[..., HereOnly]) -> None:
    made = job(PREEMPTED_STATUS)
    made._store.write(made._stop_key, b"")
    assert made._watch(cast(Any, None)) == PREEMPTED_STATUS
    assert made.started == 1


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
