"""The processes of Ray actors that this process has started, to be killed."""

from contextlib import suppress

import psutil


def actor_processes(name: str) -> list[psutil.Process]:
    """Living actors of the class `name`."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # ended while we look
            if name in process.name() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
