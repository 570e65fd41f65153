"""The folder on local disk that a refresh works in; killed refreshes leave theirs, which the next one removes."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX, _LOCK = "starflow-refresh-", "lock"
#: A younger folder may have been made a moment ago and not be locked yet.
_YOUNG_SECONDS = 3600.0


@contextmanager
def work_folder() -> Iterator[Path]:
    """A folder under TMPDIR that is gone at the end, as are those of runs that were killed."""
    _remove_abandoned(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as name, (Path(name) / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Path(name)


def _remove_abandoned(parent: Path) -> None:
    """Removes the folders whose process is gone, and with it the lock."""
    for folder in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # locked, somebody else's, or being removed
            if time.time() - folder.stat().st_mtime > _YOUNG_SECONDS:
                with (folder / _LOCK).open("rb") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder)
