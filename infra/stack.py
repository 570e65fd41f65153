"""The local stack: a real S3 server, Prefect on Postgres and one worker, on loopback, in one folder.

    with LocalStack(Path(".starflow")) as stack:
        stack.activate()
        store = open_store(stack.state.store)

`stack.json` in the folder says which processes run and how to reach them. It is rewritten after each start, so
that an `up` that dies half-way is repaired by the next one and cleaned by `down`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
from pydantic import Field, ValidationError

from infra import processes
from infra.bootstrap import bootstrap
from infra.processes import ProcessRef
from infra.services import (
    BUCKET,
    HOST,
    SERVICES,
    PrefectServer,
    Service,
    client_environment,
    last_line,
    scratch,
    write_private,
)
from starflow.config import Config
from starflow.errors import ConfigError, StarflowError

#: Below this much free disk the stack is not started: Postgres and the S3 server would stop soon after.
MINIMUM_FREE_BYTES = 2**30


class StackState(Config):
    """What `stack.json` holds and `starflow status --json` prints."""

    version: int = Field(default=1, description="Format of this file.")
    ports: dict[str, int] = Field(default_factory=dict, description="Loopback port of each listener.")
    processes: dict[str, ProcessRef] = Field(default_factory=dict, description="Running services by name.")
    env: dict[str, str] = Field(default_factory=dict, description="Environment that reaches the stack.")
    store: str = Field(default=f"s3://{BUCKET}", description="URL of the object store.")
    ui: str = Field(default="", description="Address of the Prefect UI.")


class LocalStack:
    """The stack in `state_dir` (default: $STARFLOW_HOME, else ``.starflow`` in the working directory).

    `ui_port` fixes the port of the Prefect UI; other ports are free ones, kept from the last time where possible.
    """

    def __init__(self, state_dir: Path | str | None = None, *, ui_port: int | None = None) -> None:
        chosen = state_dir or os.environ.get("STARFLOW_HOME") or ".starflow"
        self.folder = Path(chosen).expanduser().absolute()
        self.ui_port = ui_port
        self.state = StackState()

    def __enter__(self) -> LocalStack:
        try:
            self.up()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.down()

    @property
    def state_file(self) -> Path:
        return self.folder / "stack.json"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    def activate(self) -> None:
        """Points this process and its children at the stack, by the standard environment variables."""
        os.environ.update(self.state.env)

    def up(self, progress: Callable[[str], None] = lambda message: None) -> StackState:
        """Starts what is not running and returns when everything answers. Data of earlier starts are kept.

        Raises StarflowError naming the part that failed, its log and the remedy.
        """
        self._make_folder()
        with self._locked():
            self.state = self._load()
            self._choose_ports()
            self._start_all(progress)
            self._make_bucket()
            progress("registering deployments")
            bootstrap(self.state.env["PREFECT_API_URL"], self.state.store)
        return self.state

    def down(self) -> list[str]:
        """Stops exactly the processes of this stack and returns the names of the services that ran.

        The S3 server has acknowledged nothing that is not on disk, and Postgres gets a fast shutdown.
        """
        if not self.folder.exists():
            return []
        with self._locked():
            try:
                self.state = self._load()
            except ConfigError:
                # The marks below still find every process; the damaged file is kept for inspection.
                self.state_file.replace(self.state_file.with_name("stack.json.damaged"))
                self.state = StackState()
            running = self._running()
            for kind in reversed(SERVICES):
                if process := running.get(kind.name):
                    below = processes.descendants(process)
                    alone = kind.name != "worker"  # others look after their own children
                    processes.stop(below[:1] if alone else below, seconds=kind.stop_seconds, first=kind.stop_signal)
            processes.stop(processes.marked(self.folder), seconds=2.0)
            shutil.rmtree(scratch(self.folder), ignore_errors=True)
            self._save(processes={})
        return list(running)

    def status(self) -> dict[str, Any]:
        """JSON: whether the stack is up, each service's pid (None when stopped), store, UI address, folder."""
        self.state = self._load() if self.folder.exists() else StackState()
        running = self._running()
        services = {kind.name: running[kind.name].pid if kind.name in running else None for kind in SERVICES}
        return {
            "running": all(services.values()),
            "services": services,
            "store": self.state.store,
            "ui": self.state.ui,
            "env": self.state.env,
            "state_dir": str(self.folder),
            "logs": str(self.logs),
        }

    def _running(self) -> dict[str, psutil.Process]:
        found = {name: reference.process for name, reference in self.state.processes.items()}
        return {name: process for name, process in found.items() if process is not None}

    def _make_folder(self) -> None:
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise StarflowError(
                f"cannot use the folder {self.folder}: {error.strerror}; set STARFLOW_HOME to a folder you may write"
            ) from error
        if free < MINIMUM_FREE_BYTES:
            raise StarflowError(
                f"only {free / 2**20:.0f} MiB are free in {self.folder}, the stack needs "
                f"{MINIMUM_FREE_BYTES / 2**20:.0f} MiB; free some space or set STARFLOW_HOME to another disk"
            )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keeps two commands from starting or stopping the same stack at once; the second one waits."""
        with (self.folder / "stack.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _load(self) -> StackState:
        if not self.state_file.exists():
            return StackState()
        try:
            return StackState.model_validate_json(self.state_file.read_bytes())
        except ValidationError as error:
            raise ConfigError(
                f"{self.state_file} is damaged; run `starflow down` to stop what still runs, then `starflow up` "
                "(data are kept)"
            ) from error

    def _save(self, **changes: Any) -> None:
        self.state = self.state.model_copy(update=changes)
        with full_disk_explained(self.folder):
            write_private(self.state_file, self.state.model_dump(mode="json"))

    def _choose_ports(self) -> None:
        """Keeps the ports of parts that run, and those of the last start where still free."""
        running, ports = self._running(), dict(self.state.ports)
        for kind in SERVICES:
            if kind.name in running:
                if kind is PrefectServer and self.ui_port not in (None, ports["ui"]):
                    raise ConfigError(
                        f"the stack in {self.folder} runs with its UI on port {ports['ui']}; "
                        f"run `starflow down` first to move it to {self.ui_port}"
                    )
                continue
            ports.update(free_ports(kind.port_names, ports))
        if self.ui_port is not None and PrefectServer.name not in running:
            refuse_taken_port(self.ui_port)
            ports["ui"] = self.ui_port
        with full_disk_explained(self.folder):
            env = client_environment(self.folder, ports)
        if env != self.state.env and (worker := running.get("worker")):
            processes.stop(processes.descendants(worker), seconds=3.0)  # it still has the old addresses
        self._save(ports=ports, env=env, ui=f"http://{HOST}:{ports['ui']}")

    def _start_all(self, progress: Callable[[str], None]) -> None:
        """Starts the missing services; S3 comes up beside the others, which wait for what they need."""
        running = self._running()
        starting: list[Service] = []
        for kind in SERVICES:
            service = kind(self.folder, self.state.ports)
            if kind.name in running:
                continue
            self._await([earlier for earlier in starting if earlier.name == kind.needs])
            progress(f"starting {kind.name}")
            self._start(service)
            starting.append(service)
        self._await(starting)

    def _start(self, service: Service) -> None:
        with full_disk_explained(self.folder):
            service.prepare()
            reference = processes.start(
                service.command(),
                env=service.environment(),
                log=self.logs / f"{service.name}.log",
                cwd=service.working_directory(),
                user=service.user,
            )
        self._save(processes={**self.state.processes, service.name: reference})

    def _await(self, services: Sequence[Service]) -> None:
        for service in services:
            reference = self.state.processes[service.name]
            log = self.logs / f"{service.name}.log"

            def settled(service: Service = service, reference: ProcessRef = reference) -> bool:
                return not reference.alive or service.ready(reference.created)

            in_time = processes.wait_until(settled, seconds=service.start_seconds)
            if not reference.alive:
                raise StarflowError(
                    f"{service.name} stopped while starting: {last_line(tail(log))} (log: {log}); {REMEDY}"
                )
            if not in_time:
                raise StarflowError(
                    f"{service.name} did not answer within {service.start_seconds:.0f} s (log: {log}); {REMEDY}"
                )

    def _make_bucket(self) -> None:
        """Makes the bucket and writes to it, in a child, so that this process's AWS settings stay as they are."""
        code = (
            f"from starflow.objectstore import open_store; store = open_store({self.state.store!r}); "
            "store.create_bucket(); store.write('.ready', b''); store.delete(['.ready'])"
        )
        finished = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **self.state.env}, capture_output=True, text=True
        )
        if finished.returncode:
            raise StarflowError(
                f"the S3 server does not accept writes: {last_line(finished.stderr)} "
                f"(log: {self.logs / 's3.log'}); {REMEDY}"
            )


REMEDY = "`starflow doctor` checks this machine, then run `starflow up` again"


def free_ports(names: Sequence[str], preferred: dict[str, int]) -> dict[str, int]:
    """A free loopback port for each name: the preferred one if it can be bound, else any.

    All are held open until the last is chosen, so that they differ. They lie below the range from which the
    kernel takes ports for outgoing connections, so that none is gone when its server binds it.
    """
    chosen: dict[str, int] = {}
    with ExitStack() as held:
        for name in names:
            candidates = [preferred[name]] if name in preferred else []
            candidates += random.sample(range(18000, 32000), 50)
            for port in candidates:
                listener = held.enter_context(socket.socket())
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    listener.bind((HOST, port))
                except OSError:
                    continue
                chosen[name] = port
                break
            else:
                raise StarflowError("no free loopback port between 18000 and 32000; stop some servers")
    return chosen


def refuse_taken_port(port: int) -> None:
    """Raises ConfigError naming the process that listens on `port`, if any."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except PermissionError as error:
            raise ConfigError(f"port {port} is reserved for root; choose one above 1023 with --ui-port") from error
        except OSError as error:
            raise ConfigError(
                f"port {port} is taken{holder(port)}; choose another with --ui-port or stop that program"
            ) from error


def holder(port: int) -> str:
    """`` by NAME (pid N)`` for the process that listens on `port`, or nothing if it is not ours to see."""
    for process in psutil.process_iter(["name", "pid"]):
        try:
            connections = process.net_connections("tcp")
        except psutil.Error:
            continue
        if any(c.laddr and c.laddr.port == port and c.status == psutil.CONN_LISTEN for c in connections):
            return f" by {process.info['name']} (pid {process.info['pid']})"
    return ""


@contextmanager
def full_disk_explained(folder: Path) -> Iterator[None]:
    """Turns "no space left on device" into a sentence with the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StarflowError(
            f"the disk of {folder} is full; free some space or set STARFLOW_HOME to another disk"
        ) from error


def tail(log: Path, size: int = 4096) -> str:
    """The end of a log file."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - size))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
