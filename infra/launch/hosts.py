"""Launching through a shell: on this machine, or on hosts that ssh reaches. The supervisors outlive shell and ssh."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydantic import Field

from infra.launch.common import Launch, LaunchConfig, Node, exports, passed_variables, place_variables, settings
from infra.launch.tools import call, lines_of
from starflow.config import Config
from starflow.errors import ConfigError, StarflowError
from training.cluster import LOOPBACK
from training.processes import this_place

#: Shell function: start time of a living process in clock ticks since boot (with its id: unique), else nothing.
_STARTED = """\
started() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | awk '$1 != "Z" {print $20}'; }
"""
#: Its process id, start time (none if it has ended) and log, as a supervisor's shell prints them last.
_PROCESS = re.compile(r"^(\d+) (\d*) (/.*)\n\Z", re.M)


class LocalSettings(Config):
    """This machine needs none."""


class SshSettings(Config):
    """Hosts that ssh reaches without asking for a password."""

    hosts: tuple[str, ...] = Field(min_length=1, description="[USER@]HOST of each machine, as many as --nodes.")
    options: tuple[str, ...] = Field((), description="More arguments of ssh, such as -p, 2222 or -i, KEY.")
    addresses: tuple[str, ...] = Field((), description="Where the machines reach each other, if not by HOST.")
    folder: str = Field("", description="Working folder on the hosts; their home if left out.")
    python: str = Field("", description="Python of the environment on the hosts; this one's path if left out.")
    environment: tuple[str, ...] = Field(
        (), description="Variables of this shell to pass on, beside AWS_, HF_, WANDB_."
    )


class ShellLauncher:
    """One detached supervisor a machine, known by process id and start time, with a log file there."""

    @abstractmethod
    def _machines(self, launch: Launch) -> Sequence[tuple[str, str]]:
        """(host, address) of each machine."""

    @abstractmethod
    def _shell(self, host: str) -> list[str]:
        """The command that reads a script from stdin and runs it there."""

    @abstractmethod
    def _variables(self, launch: Launch, node: int, address: str) -> dict[str, str]:
        """Environment of a supervisor."""

    folder = ""

    def render(self, launch: Launch) -> str:
        return "\n".join(
            f"# {shlex.join(self._shell(host))}\n{self._script(launch, node, address, hide=True)}"
            for node, (host, address) in enumerate(self._machines(launch))
        )

    def submit(self, launch: Launch) -> dict[str, Any]:
        machines = self._machines(launch)

        def start(node: int) -> dict[str, Any] | StarflowError:
            host, address = machines[node]
            try:
                said = self._run(host, self._script(launch, node, address))
            except StarflowError as error:
                return error
            found = _PROCESS.search(said)  # after what the host says to everybody
            if found is None:
                return StarflowError(f"{host} did not start it and said {said.strip() or 'nothing'}; try ssh by hand")
            if not found[2]:
                return StarflowError(f"{host}: {shlex.join(launch.command[:1])} ended at once; see {found[3]} there")
            return {"host": host, "pid": int(found[1]), "started": found[2], "log": found[3]}

        with ThreadPoolExecutor(min(32, len(machines))) as pool:
            processes = list(pool.map(start, range(len(machines))))
        if failed := [str(process) for process in processes if isinstance(process, StarflowError)]:
            raise StarflowError(f"{len(failed)} of {len(machines)} machines did not start: {'; '.join(failed)}")
        return {"place": this_place(), "processes": processes}

    def nodes(self, launch: Launch) -> list[Node]:
        def look(node: int) -> Node:
            process = launch.handle["processes"][node]
            host = process["host"]
            if why := self._out_of_reach(launch):
                return Node(node=node, host=host, state="unknown", detail=why)
            try:
                alive = self._run(host, self._if_alive(process, "echo running")).split()[-1:] == ["running"]
            except StarflowError as error:
                return Node(node=node, host=host, state="unknown", detail=str(error))
            detail = f"process {process['pid']}, log {process['log']}"
            return Node(node=node, host=host, state="running" if alive else "ended", detail=detail)

        with ThreadPoolExecutor(min(32, launch.launch.nodes)) as pool:
            return list(pool.map(look, range(launch.launch.nodes)))

    def logs(self, launch: Launch, node: int, follow: bool) -> Iterator[str]:
        process = launch.handle["processes"][node]
        if why := self._out_of_reach(launch):
            raise StarflowError(f"{why}; its log is {process['log']} there")
        following = f"-f --pid={process['pid']} -s 0.5 " if follow else ""
        script = f"exec tail -n +1 {following}{shlex.quote(process['log'])}"
        return lines_of(self._shell(process["host"]), script)

    def stop(self, launch: Launch, force: bool) -> None:
        if self._out_of_reach(launch):
            return  # the request in the store reaches it, a few seconds later
        command = "kill -KILL" if force else "kill -TERM"

        def end(process: dict[str, Any]) -> None:
            with contextlib.suppress(StarflowError):  # `nodes` says so; the others are asked all the same
                self._run(process["host"], self._if_alive(process, f"{command} {process['pid']}"))

        with ThreadPoolExecutor(min(32, launch.launch.nodes)) as pool:
            list(pool.map(end, launch.handle["processes"]))

    def _out_of_reach(self, launch: Launch) -> str:
        """Why the machines cannot be asked from here, or nothing."""
        return ""

    def _script(self, launch: Launch, node: int, address: str, hide: bool = False) -> str:
        """Starts a supervisor and prints its process id, start time and log. hide: for people to read."""
        variables = self._variables(launch, node, address)
        secret = {name: "..." for name in variables if hide and not name.startswith("STARFLOW_")}
        folder = f"cd {shlex.quote(self.folder)}\n" if self.folder else ""
        return f"""\
set -eu
{exports({**variables, **secret})}{folder}logs="${{XDG_CACHE_HOME:-$HOME/.cache}}/starflow/launches/{launch.id}"
mkdir -p "$logs"
setsid {shlex.join(launch.command)} > "$logs/{node}.log" 2>&1 < /dev/null &
{_STARTED}echo "$! $(started $!) $logs/{node}.log"
"""

    def _if_alive(self, process: dict[str, Any], command: str) -> str:
        pid, started = process["pid"], process["started"]
        return f'{_STARTED}if [ "$(started {pid})" = "{started}" ]; then {command}; fi\n'

    def _run(self, host: str, script: str) -> str:
        """Output of a script on a host. Raises StarflowError with what the host said."""
        return call(self._shell(host), script)


class LocalLauncher(ShellLauncher):
    """On this machine; `nodes` supervisors of it, as if each were a machine."""

    def __init__(self, launch: LaunchConfig) -> None:
        settings(LocalSettings, launch)

    def _machines(self, launch: Launch) -> Sequence[tuple[str, str]]:
        return [("localhost", LOOPBACK[0])] * launch.launch.nodes

    def _shell(self, host: str) -> list[str]:
        return ["sh", "-s"]

    def _variables(self, launch: Launch, node: int, address: str) -> dict[str, str]:
        threads = max(1, len(os.sched_getaffinity(0)) // launch.ranks)
        shared = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads)}
        return {**place_variables(launch, node, address), **shared}

    def _out_of_reach(self, launch: Launch) -> str:
        theirs = str(launch.handle["place"])
        return "" if theirs == this_place() else f"it was launched on another machine, {theirs.partition('/')[0]}"


class SshLauncher(ShellLauncher):
    """On hosts that ssh reaches. The environment goes over ssh's stdin: no secret is on a command line."""

    def __init__(self, launch: LaunchConfig) -> None:
        self._settings = settings(SshSettings, launch)
        self.folder = self._settings.folder
        if len(self._settings.hosts) < launch.nodes:
            raise ConfigError(
                f"{launch.nodes} machines but {len(self._settings.hosts)} hosts; add hosts or lower --nodes"
            )
        if self._settings.addresses and len(self._settings.addresses) != len(self._settings.hosts):
            raise ConfigError("addresses must be as many as hosts, in the same order; or leave them out")

    def _machines(self, launch: Launch) -> Sequence[tuple[str, str]]:
        hosts = self._settings.hosts[: launch.launch.nodes]
        addresses = self._settings.addresses[: len(hosts)] or [host.rpartition("@")[2] for host in hosts]
        return list(zip(hosts, addresses, strict=True))

    def _shell(self, host: str) -> list[str]:
        # Of an option given twice ssh takes the first: the time-out may be set to another.
        return ["ssh", "-o", "BatchMode=yes", *self._settings.options, "-o", "ConnectTimeout=15", host, "sh", "-s"]

    def _variables(self, launch: Launch, node: int, address: str) -> dict[str, str]:
        return {**passed_variables(self._settings.environment), **place_variables(launch, node, address)}
