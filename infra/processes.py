"""Child processes known by pid and moment of their start, so that a recycled pid is never taken for ours.

Every process of a stack also carries a mark in its environment. Its descendants inherit the mark, which is how
`marked` finds what a crashed parent left behind.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
from pydantic import Field

from starflow.config import Config
from starflow.errors import REINSTALL, StarflowError
from training.processes import identity

#: Environment variable whose value (the stack's folder) marks a process as belonging to that stack.
MARK = "STARFLOW_STACK_PROCESS"
_LIBC, _PR_SET_PDEATHSIG = ctypes.CDLL(None), 1


class ProcessRef(Config):
    """A process that a later command can find again."""

    pid: int = Field(description="Process id.")
    identity: str = Field(description="What `training.processes.identity` says of it; empty if it ended at once.")
    created: float = Field(description="When it was started, in seconds since 1970.")

    @property
    def process(self) -> psutil.Process | None:
        """The live process, or None when it has ended (also when another one has its pid by now)."""
        try:
            return psutil.Process(self.pid) if identity(self.pid) == self.identity else None
        except psutil.NoSuchProcess:
            return None

    @property
    def alive(self) -> bool:
        return self.process is not None


def start(
    command: Sequence[str],
    *,
    env: dict[str, str],
    log: Path,
    cwd: Path | None = None,
    user: int | None = None,
) -> ProcessRef:
    """Starts `command` in a session of its own, output appended to `log`, as uid `user` if given.

    Raises StarflowError when the program cannot be executed.
    """
    began = time.time()
    with log.open("ab") as output:
        try:
            child = subprocess.Popen(
                command,
                env=env,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                user=user,
                group=user,
                extra_groups=None if user is None else [],
            )
        except OSError as error:
            raise StarflowError(f"cannot execute {command[0]}: {error.strerror}; {REINSTALL}") from error
    # Reaps the child when it ends while this process still lives; otherwise init does.
    threading.Thread(target=child.wait, daemon=True).start()
    with suppress(psutil.NoSuchProcess):
        return ProcessRef(pid=child.pid, identity=identity(child.pid), created=began)
    return ProcessRef(pid=child.pid, identity="", created=began)  # it has ended already


def end_with_parent() -> None:
    """For a child, before it executes its program: Linux sends it SIGTERM when the thread that started it ends."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def stop(processes: Iterable[psutil.Process], *, seconds: float, first: signal.Signals = signal.SIGTERM) -> None:
    """Sends `first`, then SIGKILL to those still there after `seconds`; returns when all have ended."""
    processes = list(processes)
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(first)
    _, stubborn = psutil.wait_procs(processes, timeout=seconds)
    for process in stubborn:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(stubborn, timeout=5)


def descendants(process: psutil.Process) -> list[psutil.Process]:
    """The process and all processes below it; those of other sessions too."""
    with suppress(psutil.NoSuchProcess):
        return [process, *process.children(recursive=True)]
    return []


def marked(folder: Path) -> list[psutil.Process]:
    """Every process, other than this one, that carries the mark of the stack in `folder`."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(MARK) == str(folder):
                found.append(process)
    return found


def wait_until(ready: Callable[[], bool], *, seconds: float, every: float = 0.1) -> bool:
    """Polls `ready` until it holds (True) or `seconds` have passed (False)."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            return False
        time.sleep(every)
    return True
