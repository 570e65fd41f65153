"""Process hygiene: nothing that the supervisor started outlives it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
from pathlib import Path

import psutil

_PR_SET_PDEATHSIG = 1
#: Variable in which a process tells those that it starts its id: it may end before they have asked who it was.
PARENT = "STARFLOW_PARENT"


def die_with_parent() -> None:
    """Asks Linux to SIGKILL this process when its parent ends, however that ends; ends it if that has happened.

    The parent is the process that `PARENT` names, whose end during this one's imports would otherwise go unseen.
    """
    parent = int(os.environ.get(PARENT, os.getppid()))
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # the parent ended before the request was in place


def identity(pid: int | None = None) -> str:
    """<place>:<pid>:<start> of a process, this one if left out: unique, and checkable by others in the same place.

    The start is in clock ticks since the boot that the place names: the time of day is set now and then, as after
    sleep, and the kernel's answer to when a process began moves with it. Raises psutil.NoSuchProcess if it has ended.
    """
    number = os.getpid() if pid is None else pid
    try:
        fields = Path(f"/proc/{number}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError as error:
        raise psutil.NoSuchProcess(number) from error
    if fields[0] == "Z":
        raise psutil.ZombieProcess(number)
    return f"{this_place()}:{number}:{fields[19]}"


def this_place() -> str:
    """Host name, boot and process namespace: host names repeat, and containers number processes anew."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")[:8]
    namespace = os.readlink("/proc/self/ns/pid").partition("[")[2].rstrip("]")
    return f"{socket.gethostname()}/{boot}/{namespace}"


def describe(owner: str) -> str:
    """`owner` (see `identity`) for people; other texts as they are."""
    place, *process = owner.rsplit(":", 2)
    return f"process {process[0]} on {place.partition('/')[0]}" if len(process) == 2 else owner


def is_gone(owner: str) -> bool:
    """True if `owner` (see `identity`) is known to have ended; processes elsewhere are never known to have."""
    place, *process = owner.rsplit(":", 2)
    if place != this_place() or len(process) != 2:
        return False
    try:
        return identity(int(process[0])) != owner
    except (psutil.NoSuchProcess, ValueError):
        return True


def kill_group(group: int) -> None:
    """SIGKILLs every process of a process group that we made."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
