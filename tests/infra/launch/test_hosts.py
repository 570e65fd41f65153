"""Detached supervisors on this machine and over ssh: real processes, found again by id and start time."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asyncssh
import psutil
import pytest

from infra.launch import Launch
from infra.launch.api import stop
from infra.launch.hosts import LocalLauncher, SshLauncher
from infra.processes import wait_until
from starflow.errors import ConfigError, StarflowError

#: Stands for a supervisor: says who and where it is, saves when asked to stop.
SUPERVISOR = (
    "bash",
    "-c",
    "trap 'echo saved; exit 75' TERM; echo machine $STARFLOW_NODE_RANK of $STARFLOW_NODES key $AWS_SECRET_ACCESS_KEY;"
    " while true; do sleep 0.05; done",
)
#: And one that does not listen.
DEAF = ("bash", "-c", "trap '' TERM; echo deaf; while true; do sleep 0.05; done")
Make = Callable[..., Launch]


def submitted(launcher: Any, launch: Launch) -> Launch:
    return launch.model_copy(update={"handle": launcher.submit(launch)})


def states(launcher: Any, launch: Launch) -> list[str]:
    return [node.state for node in launcher.nodes(launch)]


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "it's secret")
    return "it's secret"


def check_life(launcher: Any, launch: Launch) -> None:
    """Submit, status, logs, stop, kill."""
    launch = submitted(launcher, launch)
    try:
        assert states(launcher, launch) == ["running", "running"]
        for node in (0, 1):  # from then on it listens
            assert wait_until(
                lambda node=node: any("secret" in line for line in launcher.logs(launch, node, False)), seconds=60
            )
        assert list(launcher.logs(launch, 1, False))[-1:] == ["machine 1 of 2 key it's secret"]
        psutil.Process(launch.handle["processes"][1]["pid"]).kill()
        assert wait_until(lambda: states(launcher, launch) == ["running", "ended"], seconds=60)
        launcher.stop(launch, force=False)
        assert wait_until(lambda: states(launcher, launch) == ["ended", "ended"], seconds=60)
        assert list(launcher.logs(launch, 0, True))[-1] == "saved"
    finally:
        launcher.stop(launch, force=True)


def test_local(make_launch: Make, secret: str) -> None:
    launch = make_launch(*SUPERVISOR, nodes=2)
    check_life(LocalLauncher(launch.launch), launch)


def test_a_recycled_process_id_is_not_taken_for_ours(make_launch: Make) -> None:
    launch = make_launch(*SUPERVISOR)
    launcher = LocalLauncher(launch.launch)
    launch = submitted(launcher, launch)
    process = launch.handle["processes"][0]
    other = {**launch.handle, "processes": [{**process, "started": "1"}]}
    try:
        launcher.stop(launch.model_copy(update={"handle": other}), force=True)
        assert states(launcher, launch) == ["running"]
    finally:
        launcher.stop(launch, force=True)


def test_another_machine_is_not_asked(make_launch: Make) -> None:
    launch = make_launch()
    handle = {"place": "elsewhere/boot/1", "processes": [{"host": "localhost", "pid": 1, "started": "1", "log": "/l"}]}
    launch = launch.model_copy(update={"handle": handle})
    node = LocalLauncher(launch.launch).nodes(launch)[0]
    assert (node.state, node.detail) == ("unknown", "it was launched on another machine, elsewhere")
    with pytest.raises(StarflowError, match="its log is /l there"):
        next(LocalLauncher(launch.launch).logs(launch, 0, False))


def test_ssh_settings(make_launch: Make) -> None:
    with pytest.raises(ConfigError, match="2 machines but 1 hosts"):
        SshLauncher(make_launch(on="ssh", nodes=2, cluster={"hosts": ["a"]}).launch)
    with pytest.raises(ConfigError, match=r"unknown key host.*did you mean hosts"):
        SshLauncher(make_launch(on="ssh", cluster={"host": ["a"]}).launch)


def test_ssh_keeps_secrets_off_command_lines(make_launch: Make, fake: Any, secret: str, tmp_path: Path) -> None:
    """The program `ssh` notes its arguments and runs the rest here."""
    fake("ssh", "print('Welcome!', flush=True); sys.exit(subprocess.run(ARGV[ARGV.index('sh'):]).returncode)")
    cluster = {"hosts": ["me@one", "two"], "options": ["-p", "2222"], "folder": str(tmp_path)}
    launch = make_launch(*SUPERVISOR, on="ssh", nodes=2, cluster=cluster)
    launcher = SshLauncher(launch.launch)
    check_life(launcher, launch)
    calls = [json.loads(line) for line in (tmp_path / "ssh.calls").read_text().splitlines()]
    assert ["-o", "BatchMode=yes", "-p", "2222", "-o", "ConnectTimeout=15", "me@one", "sh", "-s"] in calls
    assert not [call for call in calls if any(secret in argument for argument in call)]
    assert "export STARFLOW_ADDRESS=one\n" in launcher.render(launch)
    assert "export AWS_SECRET_ACCESS_KEY=...\n" in launcher.render(launch)


def test_ssh_says_what_every_host_said(make_launch: Make, fake: Any, tmp_path: Path) -> None:
    fake("ssh", "sys.exit(f'ssh: connect to host {ARGV[-3]} port 22: Connection refused' * (ARGV[-3] != 'two'))")
    launch = make_launch(on="ssh", nodes=3, cluster={"hosts": ["one", "two", "three"]})
    launcher = SshLauncher(launch.launch)
    with pytest.raises(
        StarflowError, match=r"ssh .* one sh -s failed: .*host one .*refused; ssh .*host three .*refused"
    ):
        launcher.submit(launch)


def test_a_host_that_starts_nothing_is_named(make_launch: Make, fake: Any) -> None:
    fake("ssh", "print('This account is not available.')")
    launch = make_launch(on="ssh", cluster={"hosts": ["one"]})
    with pytest.raises(StarflowError, match=r"one did not start it and said This account is not available\.; try ssh"):
        SshLauncher(launch.launch).submit(launch)


def test_what_ends_at_once_is_said_with_its_log(make_launch: Make, fake: Any) -> None:
    fake("ssh", "print('7  /logs/0.log')")
    launch = make_launch("/misspelt/python", on="ssh", cluster={"hosts": ["one"]})
    with pytest.raises(StarflowError, match=r"one: /misspelt/python ended at once; see /logs/0\.log there"):
        SshLauncher(launch.launch).submit(launch)


def test_a_host_that_cannot_be_reached_keeps_none_from_stopping(make_launch: Make, fake: Any, tmp_path: Path) -> None:
    fake("ssh", "sys.exit('no route' if ARGV[-3] == 'one' else subprocess.run(ARGV[-2:]).returncode)")
    launch = make_launch(*SUPERVISOR, on="ssh", nodes=1, cluster={"hosts": ["two"]})
    launcher = SshLauncher(launch.launch)
    process = launcher.submit(launch)["processes"][0]
    try:
        away = {**process, "host": "one"}
        launch = make_launch(on="ssh", nodes=2, cluster={"hosts": ["one", "two"]})
        launch = launch.model_copy(update={"handle": {"processes": [away, process]}})
        launcher.stop(launch, force=False)
        assert wait_until(lambda: states(launcher, launch) == ["unknown", "ended"], seconds=60)
        assert "no route" in launcher.nodes(launch)[0].detail
    finally:
        launcher.stop(launch, force=True)


@pytest.mark.parametrize(("command", "seconds", "said"), [(SUPERVISOR, 60, "saved"), (DEAF, 0, "deaf")])
def test_machines_leave_also_while_the_store_is_away(
    make_launch: Make, tmp_path: Path, command: tuple[str, ...], seconds: float, said: str
) -> None:
    (tmp_path / "away").touch()
    launch = make_launch(*command, on="local").model_copy(update={"store": str(tmp_path / "away")})
    launcher = LocalLauncher(launch.launch)
    launch = submitted(launcher, launch)
    try:
        assert wait_until(lambda: any(launcher.logs(launch, 0, False)), seconds=60)
        with pytest.raises(StarflowError, match="away"):
            stop(launch, seconds)
        assert states(launcher, launch) == ["ended"]
        assert said in "\n".join(launcher.logs(launch, 0, False))
    finally:
        launcher.stop(launch, force=True)


async def run_process(process: asyncssh.SSHServerProcess[bytes]) -> None:
    """What sshd does: runs the command in a shell, wired to the connection."""
    child = await asyncio.create_subprocess_shell(
        process.command or "", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    await process.redirect(stdin=child.stdin, stdout=child.stdout)
    process.exit(await child.wait())


@pytest.fixture
def ssh_options(tmp_path: Path) -> Iterator[list[str]]:
    """Options of the real `ssh` that reach a real SSH server on a free port."""
    if shutil.which("ssh") is None:
        pytest.skip("no ssh client here")
    key = asyncssh.generate_private_key("ssh-ed25519")
    key.write_private_key(tmp_path / "key")
    (tmp_path / "key").chmod(0o600)
    key.write_public_key(tmp_path / "key.pub")
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def listen() -> asyncssh.SSHAcceptor:
        return await asyncssh.listen(
            "127.0.0.1",
            0,
            server_host_keys=[key],
            authorized_client_keys=str(tmp_path / "key.pub"),
            process_factory=run_process,
            encoding=None,
        )

    server = asyncio.run_coroutine_threadsafe(listen(), loop).result(30)
    known = ["-o", f"UserKnownHostsFile={tmp_path}/known", "-o", "StrictHostKeyChecking=no", "-F", "none"]
    yield ["-p", str(server.get_port()), "-i", str(tmp_path / "key"), *known]

    async def close() -> None:
        server.close()
        await server.wait_closed()

    asyncio.run_coroutine_threadsafe(close(), loop).result(30)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(30)


def test_real_ssh(make_launch: Make, ssh_options: list[str], secret: str) -> None:
    cluster = {"hosts": ["127.0.0.1", "localhost"], "options": ssh_options}
    launch = make_launch(*SUPERVISOR, on="ssh", nodes=2, cluster=cluster)
    check_life(SshLauncher(launch.launch), launch)
