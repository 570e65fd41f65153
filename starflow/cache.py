"""A bounded folder of files that can be had again: downloaded shards, captions made ready for mapping.

All processes of a node share it. Each file is made once, under a lock that the kernel drops with its holder,
and appears by rename once the disk has it, so that neither a crash nor a loss of power leaves anything that a
reader could take for complete; one that proves corrupt all the same is made anew. The least recently
opened files go first; whoever still maps one keeps its bytes, and the disk has them, until the map is closed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

from starflow.errors import CorruptError, StoreError

#: Files that a crash left unfinished are swept once they are this old, in seconds.
UNFINISHED_SECONDS = 3600.0
#: Share of its files that a folder keeps when the disk or a quota is full, and is its limit from then on.
FULL_SHARE = 0.75
#: Seconds between attempts to write to a full disk: other processes close their maps of what has been evicted.
PAUSES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
#: Seconds that it takes until all have closed theirs: only a disk that is full after that shrinks the folder again.
SETTLED_SECONDS = 5.0
#: Seconds between looks at what other processes have evicted.
LOOK_SECONDS = 1.0
_ATTEMPTS = 5

T = TypeVar("T")


class FileCache:
    """Files by name under `directory`, together at most about `limit` bytes (default 64 GiB)."""

    def __init__(self, directory: Path, limit: int = 64 * 2**30) -> None:
        self.directory, self.limit = directory.expanduser().absolute(), limit
        #: Called when files may have been evicted, by whichever process; for whoever maps them.
        self.on_evict: list[Callable[[], None]] = []
        self._told = 0.0

    def holds(self, name: str) -> bool:
        """Whether the file `name` is there."""
        return (self.directory / name).exists()

    def keep(self, name: str) -> bool:
        """Makes the file `name` one of the last to go; False when it has gone."""
        try:
            os.utime(self.directory / name)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def read(self, name: str, make: Callable[[Path], None], read: Callable[[BinaryIO], T]) -> T:
        """What `read` makes of the file `name`; one that it finds corrupt (CorruptError) is made anew, once.

        Raises what `make` and `read` raise, and StoreError when the disk is full.
        """
        try:
            with self.open(name, make) as file:
                return read(file)
        except CorruptError:
            (self.directory / name).unlink(missing_ok=True)
            with self.open(name, make) as file:
                return read(file)

    def open(self, name: str, make: Callable[[Path], None]) -> BinaryIO:
        """The file `name`, open for reading; `make` writes it to the path it is given when it is missing."""
        path = self.directory / name
        for _ in range(_ATTEMPTS):
            try:
                file = path.open("rb")
            except (FileNotFoundError, NotADirectoryError):
                self._make(path, make)  # and look again: it may be evicted before we open it
            else:
                os.utime(file.fileno())  # recently used: among the last to go
                self.look()
                return file
        raise StoreError(
            f"{path} is evicted faster than it can be opened: {self.limit} bytes are too small a cache; "
            "allow it more, in training with cache_gib, or free some space if the disk was full"
        )

    def make_room(self, size: int) -> None:
        """Evicts files of `size` bytes in all, as far as there are any, for what else needs the disk."""
        self._evict(room=size)

    def look(self) -> None:
        """Tells whoever maps files, now and then, to close what other processes have evicted."""
        if time.monotonic() - self._told > LOOK_SECONDS:
            self._tell()

    def _make(self, path: Path, make: Callable[[Path], None]) -> None:
        try:
            for pause in (*PAUSES, None):
                try:
                    with self._locked(f"{path.name[-2:]}.lock"):
                        if not path.exists():  # else another process has made it while we waited
                            _make_durably(path, make)
                    break
                except OSError as error:
                    if pause is None or full_disk(error) is None:
                        raise
                self._evict(path.name, full=True)
                time.sleep(pause)
        except OSError as error:
            raise StoreError(
                f"cache {self.directory} cannot take {path.name}: {error.strerror or error}; "
                "free some space or choose another folder"
            ) from error
        self._evict(path.name)

    def _evict(self, keep: str = "", full: bool = False, room: int = 0) -> None:
        with self._locked("evict.lock") as lock:
            files, total = [], 0
            for entry in filter(os.DirEntry.is_file, os.scandir(self.directory)):
                try:
                    status = entry.stat()
                except FileNotFoundError:
                    continue  # another process renamed it meanwhile
                total += status.st_size
                if not entry.name.endswith(".lock") and entry.name != keep:
                    files.append((status.st_mtime, status.st_size, Path(entry.path)))
            # All threads and processes find the disk full at once: they shrink the folder once, not each of them.
            settled = time.time() - os.fstat(lock).st_mtime > SETTLED_SECONDS
            if full and settled and any("~" not in path.name for *_, path in files):
                self.limit = min(self.limit, int(FULL_SHARE * total))
                os.utime(lock)
            limit = min(self.limit, total - room)
            for modified, size, path in sorted(files):
                unfinished = "~" in path.name
                if time.time() - modified > UNFINISHED_SECONDS if unfinished else total > limit:
                    path.unlink(missing_ok=True)
                    total -= size
        self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        for tell in self.on_evict:
            tell()

    @contextmanager
    def _locked(self, name: str) -> Iterator[int]:
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / name).open("a") as lock:  # "w" would change its time, that of the last shrinking
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield lock.fileno()


def full_disk(error: BaseException | None) -> OSError | None:
    """The cause of `error` that says that a disk or a quota is full, if any."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return error
        error = error.__cause__ or error.__context__
    return None


def _make_durably(path: Path, make: Callable[[Path], None]) -> None:
    unfinished = path.with_name(f"{path.name}~")
    try:
        make(unfinished)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)  # on a full disk others need its room
        raise
