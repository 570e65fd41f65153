"""`starflow launch` on this machine with real ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
from typer.testing import CliRunner

from infra.launch import (
    AlreadyLaunchedError,
    Launch,
    LaunchConfig,
    active,
    logs,
    newest,
    prepare,
    status,
    stop,
    submit,
)
from infra.launch.api import _hand_over
from infra.launch.common import Node, NodeState
from infra.launch.hosts import LocalLauncher, SshLauncher
from infra.launch_command import launch as launch_app
from infra.processes import descendants, wait_until
from starflow.errors import ConfigError, NotFoundError, StarflowError, StoreError, UnavailableError
from starflow.objectstore import ObjectStore, open_store
from tests.training.run_helpers import lines
from tests.training.small_snapshot import save_checkpoint
from training.config import TrainConfig
from training.events import Events
from training.lease import Lease
from training.record import resolve

Make = Callable[..., TrainConfig]
CPU = LaunchConfig(ranks_per_node=2)


@pytest.fixture(autouse=True)
def _logs_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def starflow(*arguments: str) -> Any:
    command = [sys.executable, "-m", "starflow.cli", "launch", *arguments, "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        ({"nodes": 2}, "ranks 3 do not divide over 2"),
        ({"nodes": 2, "ranks_per_node": 3}, "global_batch_size 8 does not divide over ranks 6"),
        ({"gpus_per_node": 2, "ranks_per_node": 4}, "a GPU has one rank"),
        ({"min_nodes": 2}, "min_nodes 2 is more than nodes 1"),
        (
            {"cluster": {"partition": "a"}},
            r"cluster settings of local \(keys of --cluster FILE, or cluster.KEY=VALUE\): .*partition",
        ),
        ({"cluster": {"model": "a", "file": "b"}}, "unknown key model; known keys: none; unknown key file"),
    ],
)
def test_what_does_not_fit_is_refused(make_config: Make, launch: dict[str, Any], message: str) -> None:
    config = make_config(ranks=1).model_copy(update={"ranks": 3})
    with pytest.raises(ConfigError, match=message):
        submit(config, LaunchConfig(**launch))
    assert not list(open_store(config.store).list("runs/"))


def test_ranks_follow_from_the_machines(make_config: Make) -> None:
    for launch, ranks in (({"nodes": 4, "gpus_per_node": 2}, 8), ({"nodes": 2}, 2), ({"ranks_per_node": 4}, 4)):
        prepared, config = prepare(make_config(ranks=2), LaunchConfig(**launch))
        assert prepared.ranks == config.ranks == ranks


def test_unknown_runs(store: ObjectStore) -> None:
    assert active(store.url, "nothing") is None
    with pytest.raises(NotFoundError, match="'nothing' was never launched"):
        newest(store.url, "nothing")


def test_machines_of_a_launch_that_failed_half_way_are_asked_to_leave(
    make_config: Make, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_host_is_down(self: LocalLauncher, launch: Launch) -> dict[str, Any]:
        raise StarflowError("no route to gpu2")

    monkeypatch.setattr(LocalLauncher, "submit", one_host_is_down)
    with pytest.raises(StarflowError, match="gpu2"):
        submit(make_config(), CPU)
    assert [info.key for info in store.list("runs/test/launches/") if info.key.endswith("/stop")]
    assert active(store.url, "test") is None


TWO_HOSTS = LaunchConfig(on="ssh", nodes=2, cluster={"hosts": ["one", "two"]})


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> dict[int, str]:
    """Two hosts that nothing runs on; their states may be set, or taken away where nothing answers at all."""
    states = {0: "running", 1: "running"}

    def look(self: SshLauncher, launch: Launch) -> list[Node]:
        if not states:
            raise StarflowError("ssh is not installed here")
        names = ("one", "two")
        return [
            Node(node=node, host=names[node], state=cast(NodeState, state), detail="no route" * (state == "unknown"))
            for node, state in states.items()
        ]

    monkeypatch.setattr(SshLauncher, "submit", lambda self, launch: {})
    monkeypatch.setattr(SshLauncher, "stop", lambda self, launch, force: None)
    monkeypatch.setattr(SshLauncher, "nodes", look)
    monkeypatch.setattr("infra.launch.api.KILL_SECONDS", 0.1)
    return states


def test_a_machine_that_cannot_be_asked_has_not_ended(
    make_config: Make, store: ObjectStore, hosts: dict[int, str]
) -> None:
    config = make_config()
    launch = submit(config, TWO_HOSTS)
    hosts |= {0: "ended", 1: "unknown"}
    assert status(launch)["alive"]  # nobody has heard of it yet
    with pytest.raises(AlreadyLaunchedError, match=r"may be at work on machine 1, which cannot be asked \(no route\)"):
        submit(config, TWO_HOSTS)
    lease = Lease(store, "test", "elsewhere/boot/1:7:1.00", seconds=60)
    lease.acquire()
    Events(store, "test").add("started", "attempt 1", 1, None)
    shown = CliRunner().invoke(launch_app, ["status", "test", "--store", store.url])
    assert shown.output.startswith("test: running, nothing saved yet of 6, 2 ranks\n")
    assert "machine 1  no answer two  no route" in shown.output
    answer = stop(launch, 0)
    assert (answer["alive"], answer["unreachable"], answer["state"]) == (True, [1], "running")

    lease.release()
    Events(store, "test").add("preempted", "saved", 1, None)
    for _ in range(2):  # as often as one likes
        said = CliRunner().invoke(launch_app, ["stop", "test", "--store", store.url])
        assert said.exit_code == 1
        assert "machine 1 two cannot be asked whether it has stopped: no route" in said.output
    assert active(store.url, "test") is None  # the store is all that counts for going on
    hosts[1] = "ended"
    assert CliRunner().invoke(launch_app, ["stop", "test", "--store", store.url]).exit_code == 0


def test_what_ran_elsewhere_has_said_that_it_ended(make_config: Make, store: ObjectStore) -> None:
    """A local launch, looked at from another machine: only the store can tell."""
    config, elsewhere = make_config(), {"place": "elsewhere/boot/1", "processes": [{"host": "localhost"}]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalLauncher, "submit", lambda self, launch: elsewhere)
        launch = submit(config, CPU)
    assert status(launch)["unreachable"] == [0]
    save_checkpoint(store, config, 6)
    Events(store, "test").add("completed", "done", 1, 6)
    answer = status(launch)
    assert (answer["alive"], answer["unreachable"], answer["state"]) == (False, [], "completed")


def test_a_target_that_does_not_answer_ends_nothing(
    make_config: Make, store: ObjectStore, hosts: dict[int, str]
) -> None:
    submit(make_config(steps=6), TWO_HOSTS)
    hosts |= {0: "ended", 1: "ended"}
    launch = submit(make_config(steps=9), TWO_HOSTS)
    assert status(launch)["steps"] == 9  # its own, not those the run was started with
    hosts.clear()
    answer = status(launch)
    assert (answer["alive"], answer["unreachable"]) == (True, [0, 1])
    assert answer["nodes"][0]["detail"] == "ssh is not installed here"
    answer = stop(launch, 0)  # it had not begun: what starts now finds the request, and leaves
    assert (answer["alive"], answer["unreachable"]) == (False, [0, 1])


@pytest.mark.parametrize("failure", [UnavailableError, StoreError])
def test_while_nobody_can_say_machines_are_made_to_leave(
    make_config: Make,
    store: ObjectStore,
    hosts: dict[int, str],
    monkeypatch: pytest.MonkeyPatch,
    failure: type[StoreError],
) -> None:
    """Neither the target nor the store answers: stopping goes on to force, and says what was in its way."""
    launch = submit(make_config(), TWO_HOSTS)
    hosts.clear()
    asked: list[bool] = []

    def away(*_: Any, **__: Any) -> None:
        raise failure("s3 is away")

    monkeypatch.setattr(SshLauncher, "stop", lambda self, launch, force: asked.append(force))
    monkeypatch.setattr("infra.launch.api.open_store", away)
    with pytest.raises(failure, match="s3 is away"):
        stop(launch, 0)
    assert asked == [False, True]


def test_a_continuation_is_complete_at_its_own_last_step(
    make_config: Make, store: ObjectStore, hosts: dict[int, str]
) -> None:
    hosts |= {0: "ended", 1: "ended"}
    first = submit(make_config(steps=6), TWO_HOSTS)
    events = Events(store, "test")
    save_checkpoint(store, resolve(store, make_config(steps=6)), 6)
    events.add("completed", "done", 1, 6)
    assert status(first)["state"] == "completed"
    second = submit(make_config(steps=9), TWO_HOSTS)
    assert status(second)["state"] == "interrupted"  # gone before it had begun
    Events(store, "test").add("waiting", "for the lease of the one that is gone", 2, None)
    assert status(second)["state"] == "interrupted"  # and while it waited
    Events(store, "test").add("resumed", "going on", 2, 6)
    assert status(second)["state"] == "interrupted"
    save_checkpoint(store, resolve(store, make_config(steps=9)), 8)
    assert status(second)["state"] == "interrupted"
    save_checkpoint(store, resolve(store, make_config(steps=9)), 9)
    assert status(second)["state"] == "completed"  # though its supervisor could not say so any more


def test_of_two_launches_at_once_one_is_refused(make_config: Make, store: ObjectStore, hosts: dict[int, str]) -> None:
    """The other is still handing over; what is found afterwards is the one that counts."""
    other = Lease(store, "test", "elsewhere/boot/1:7:1.00", seconds=60, name="submitting")
    other.acquire()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lease, "patience", 0.1)
        with pytest.raises(AlreadyLaunchedError, match=r"is being launched by process 7 on elsewhere all the while"):
            submit(make_config(), TWO_HOSTS)
    assert not list(store.list("runs/test/launches/"))

    hosts |= {0: "pending", 1: "pending"}
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(submit, make_config(), TWO_HOSTS)
        launch = _hand_over(SshLauncher(TWO_HOSTS), *prepare(make_config(), TWO_HOSTS))
        other.release()
        with pytest.raises(AlreadyLaunchedError, match="is still at work"):
            second.result(100)
    assert newest(store.url, "test") == launch


@pytest.mark.slow
def test_kill_stop_and_resume(make_config: Make, store: ObjectStore, tmp_path: Path) -> None:
    """The command line submits; the supervisor is killed, launched again, stopped, launched again to the end."""
    config = make_config(steps=3000, checkpoint_every=5, validation_every=3000)
    file = tmp_path / "train.yaml"
    file.write_text(config.model_dump_json())
    answer = starflow("--on", "local", "--ranks-per-node", "2", "--config", str(file), "seed=3")
    launch = newest(store.url, "test")
    assert answer["id"] == launch.id
    try:
        assert wait_until(lambda: (status(launch)["step"] or 0) >= 5, seconds=100)
        shown = starflow("status", "test", "--store", store.url)
        assert (shown["state"], shown["nodes"][0]["state"], shown["ranks"]) == ("running", "running", 2)
        with pytest.raises(AlreadyLaunchedError, match=r"launched at .* still at work"):
            submit(config, CPU)
        supervisor = launch.handle["processes"][0]["pid"]
        family = descendants(psutil.Process(supervisor))
        os.kill(supervisor, signal.SIGKILL)
        assert wait_until(lambda: not status(launch)["alive"], seconds=20)
        assert status(launch)["state"] == "interrupted"
        assert wait_until(lambda: not any(p.is_running() and p.status() != "zombie" for p in family), seconds=20)

        config = config.model_copy(update={"seed": 3})
        launch = submit(config, CPU)
        assert wait_until(lambda: status(launch)["state"] == "running", seconds=100)
        assert wait_until(lambda: any("images/s" in line for line in logs(launch)), seconds=100)
        answer = starflow("stop", "test", "--store", store.url)
        assert (answer["state"], answer["alive"]) == ("preempted", False)
        reached = answer["step"]
        assert reached > 5

        launch = submit(config.model_copy(update={"steps": reached + 2}), CPU)
        said = list(logs(launch, follow=True))
        assert f"run test: attempt 3: 2 ranks, ZeRO-2, resuming from step {reached}" in said
        assert status(launch)["state"] == "completed"
        assert active(store.url, "test") is None
    finally:
        stop(launch, 0)
    assert [line["step"] for line in lines(store, "test")] == list(range(1, reached + 3))


@pytest.mark.slow
def test_several_machines_on_this_one(make_config: Make, store: ObjectStore) -> None:
    """Two supervisors on loopback; one is killed, the other goes on alone to the end."""
    config = make_config(steps=300, checkpoint_every=20, validation_every=300, ranks=2)
    launch = submit(config, LaunchConfig(nodes=2, patience=1))
    try:
        assert wait_until(lambda: (status(launch)["step"] or 0) >= 20, seconds=100)
        os.kill(launch.handle["processes"][1]["pid"], signal.SIGKILL)
        assert wait_until(lambda: not status(launch)["alive"], seconds=200)
    finally:
        stop(launch, 0)
    assert status(launch)["state"] == "completed"
    assert any("1 rank on 1 of 2 machines" in line for line in logs(launch))
    assert [line["step"] for line in lines(store, "test")] == list(range(1, 301))


def test_help_has_the_options_of_submit() -> None:
    said = CliRunner().invoke(launch_app, ["--help"], env={"COLUMNS": "200"}).output
    assert all(word in said for word in ("status", "logs", "stop", "--gpus-per-node", "--dry-run"))


def test_an_endpoint_that_others_do_not_reach_is_said(
    make_config: Make, tmp_path: Path, hosts: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.yaml").write_text(make_config().model_dump_json())
    arguments = ["--config", str(tmp_path / "train.yaml"), "--nodes", "2", "cluster.hosts=[one,two]"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000")
    said = CliRunner().invoke(launch_app, ["--on", "ssh", *arguments]).output
    assert "AWS_ENDPOINT_URL is http://127.0.0.1:9000: other machines do not reach it" in said
    assert "launched on ssh: 2 ranks on 2 machines" in said


def test_dry_run_shows_what_would_be_submitted(make_config: Make, tmp_path: Path, store: ObjectStore) -> None:
    file = tmp_path / "train.yaml"
    file.write_text(make_config().model_dump_json())
    answer = starflow(
        "--on", "slurm", "--nodes", "2", "--config", str(file), "--dry-run", "cluster.partition=long"
    )  # fmt: skip
    assert "#SBATCH --partition=long\n" in answer["submitted"]
    assert answer["plan"]["store_writable"] is True
    assert not list(store.list("runs/"))
