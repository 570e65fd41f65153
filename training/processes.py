"""Process hygiene: nothing that the supervisor started outlives it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket

import psutil

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Asks Linux to SIGKILL this process when its parent ends, however that ends."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # the parent ended before the request was in place


def identity() -> str:
    """host:pid:start of this process: unique, and checkable by others on the same host."""
    process = psutil.Process()
    return f"{socket.gethostname()}:{process.pid}:{process.create_time():.2f}"


def is_gone(owner: str) -> bool:
    """True if `owner` (see `identity`) is known to have ended; processes of other hosts are never known to."""
    host, *process = owner.rsplit(":", 2)
    if host != socket.gethostname() or len(process) != 2:
        return False
    try:
        return f"{psutil.Process(int(process[0])).create_time():.2f}" != process[1]
    except (psutil.NoSuchProcess, ValueError):
        return True


def kill_group(group: int) -> None:
    """SIGKILLs every process of a process group that we made."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
