"""The only way to durable bytes: a local folder or an S3 bucket, with the same behaviour.

Every write is atomic: a reader sees the whole object or none. `create` is create-if-absent (S3 conditional
put; hard link locally) and `replace` is replace-if-unchanged; commits and leases are built on these two.
Endpoint, region and credentials come from the standard AWS environment variables.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from starflow.errors import AlreadyExistsError, ChangedError, ConfigError, NotFoundError, StoreError

#: Names of a local store's files that are being written.
_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{32}~")


@dataclass(frozen=True)
class ObjectInfo:
    """A stored object: key relative to the store, size in bytes, and a tag that changes with its content."""

    key: str
    size: int
    etag: str


class ObjectStore(ABC):
    """Durable bytes under string keys; ``/`` in a key groups, as in S3."""

    url: str

    @abstractmethod
    def read(self, key: str, start: int | None = None, length: int | None = None) -> bytes:
        """The object's bytes, or `length` of them from `start`. Raises NotFoundError."""

    @abstractmethod
    def write(self, key: str, data: bytes | memoryview) -> None:
        """Stores `data`, replacing what was there."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> None:
        """Stores `data` if the key is free; the same bytes twice are harmless.

        Raises AlreadyExistsError when other bytes are there: of any number of racers exactly one wins.
        """

    @abstractmethod
    def replace(self, key: str, data: bytes, etag: str) -> None:
        """Stores `data` if the object still carries `etag`. Raises ChangedError otherwise."""

    @abstractmethod
    def head(self, key: str) -> ObjectInfo | None:
        """What is known of the object without reading it, or None when there is none."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Every object whose key starts with `prefix`; those of one folder come sorted by key."""

    @abstractmethod
    def delete(self, keys: Iterable[str]) -> None:
        """Deletes the objects; missing ones are fine."""

    @abstractmethod
    def sweep(self, seconds: float, dry_run: bool = False) -> int:
        """Deletes what writes that died more than `seconds` ago have left, which no reader sees; returns how many."""

    @abstractmethod
    def upload(self, key: str, path: Path) -> None:
        """Stores the file's content."""

    @abstractmethod
    def download(self, key: str, path: Path) -> str:
        """Writes the object to `path`, which appears only when complete, and returns the SHA-256 (hex) of its bytes.

        Raises NotFoundError.
        """


def open_store(url: str, patience: float | None = None) -> ObjectStore:
    """Opens ``s3://bucket/prefix`` or a local folder (made on the first write).

    patience: seconds after which an operation that S3 does not answer fails (UnavailableError), for what is of no
    use when it is late, such as a sign of life; about two minutes if left out. Raises ConfigError for any other kind
    of URL.
    """
    parts = urlsplit(url)
    if parts.scheme == "s3":
        from starflow.s3store import S3Store  # builds on the classes below

        if not parts.netloc:
            raise ConfigError(f"store {url!r} names no bucket; write s3://BUCKET/PREFIX")
        return S3Store(parts.netloc, parts.path.strip("/"), patience)
    if parts.scheme == "file":
        return LocalStore(Path(parts.path))
    if "://" in url or not url:
        raise ConfigError(f"store {url!r} is neither s3://BUCKET/PREFIX nor a folder")
    return LocalStore(Path(url))


class LocalStore(ObjectStore):
    """Objects as files under `root`. Names ending in ``~`` are writes that never finished."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()
        self.url = str(self.root)

    def path(self, key: str) -> Path:
        """Where the object lies; readers that memory-map use it."""
        if key.startswith("/") or ".." in key.split("/") or key.endswith("~"):
            raise StoreError(f"key {key!r} is not usable in {self.url}; use plain relative names")
        return self.root / key

    def read(self, key: str, start: int | None = None, length: int | None = None) -> bytes:
        with self._errors("read", key), self._open(key) as file:
            file.seek(start or 0)
            return file.read(-1 if length is None else length)

    def write(self, key: str, data: bytes | memoryview) -> None:
        with self._errors("write", key), self._temporary(key) as unfinished:
            _write_durably(unfinished, data)
            unfinished.replace(self.path(key))

    def create(self, key: str, data: bytes) -> None:
        with self._errors("create", key), self._temporary(key) as unfinished:
            _write_durably(unfinished, data)
            try:
                os.link(unfinished, self.path(key))
            except FileExistsError:
                if self.path(key).read_bytes() != data:
                    raise AlreadyExistsError(
                        f"{self.url}/{key} exists with other content: another writer committed first"
                    ) from None

    def replace(self, key: str, data: bytes, etag: str) -> None:
        with self._errors("replace", key), self._temporary(key) as unfinished:
            _write_durably(unfinished, data)
            with self._locked(key):
                info = self.head(key)
                if info is None or info.etag != etag:
                    raise ChangedError(f"{self.url}/{key} has been changed by another writer since it was read")
                unfinished.replace(self.path(key))

    def head(self, key: str) -> ObjectInfo | None:
        try:
            return self._info(self.path(key))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        folder, _, _ = prefix.rpartition("/")
        yield from self._walk(self.path(folder) if folder else self.root, prefix)

    def _walk(self, folder: Path, prefix: str) -> Iterator[ObjectInfo]:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            path = folder / entry.name
            key = path.relative_to(self.root).as_posix()
            if entry.is_dir():
                if f"{key}/".startswith(prefix) or prefix.startswith(f"{key}/"):
                    yield from self._walk(path, prefix)
            elif key.startswith(prefix) and not key.endswith("~"):
                with suppress(FileNotFoundError):  # deleted since the folder was read
                    yield self._info(path)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            path = self.path(key)
            with self._errors("delete", key):
                path.unlink(missing_ok=True)
                with suppress(OSError):  # not empty: other objects live there
                    for parent in path.relative_to(self.root).parents:
                        (self.root / parent).rmdir()

    def sweep(self, seconds: float, dry_run: bool = False) -> int:
        limit, found = time.time() - seconds, 0
        for folder, _, names in os.walk(self.root):
            for name in names:
                path = Path(folder, name)
                if not _UNFINISHED.fullmatch(name):
                    continue
                with suppress(FileNotFoundError):  # just finished
                    if path.stat().st_mtime <= limit:
                        found += 1
                        if not dry_run:
                            path.unlink()
        return found

    def upload(self, key: str, path: Path) -> None:
        with self._errors("upload", key), path.open("rb") as source, self._temporary(key) as unfinished:
            _copy_durably(source, unfinished)
            unfinished.replace(self.path(key))

    def download(self, key: str, path: Path) -> str:
        unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}~")
        with self._errors("download", key), self._open(key) as source:
            try:
                _copy_durably(source, unfinished)
                digest = file_sha256(unfinished)
                unfinished.replace(path)
                return digest
            finally:
                unfinished.unlink(missing_ok=True)

    def _info(self, path: Path) -> ObjectInfo:
        stat = path.stat()
        etag = f"{stat.st_ino:x}-{stat.st_mtime_ns:x}-{stat.st_size:x}"
        return ObjectInfo(path.relative_to(self.root).as_posix(), stat.st_size, etag)

    @contextmanager
    def _temporary(self, key: str) -> Iterator[Path]:
        path = self.path(key)
        unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}~")
        try:
            _make_empty(unfinished)
        except FileNotFoundError:  # a delete removed its folder, which was empty until now
            _make_empty(unfinished)
        try:
            yield unfinished
        finally:
            unfinished.unlink(missing_ok=True)

    @contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        lock = self.root / f".{hashlib.sha256(key.encode()).hexdigest()[:16]}.lock~"
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _open(self, key: str) -> BinaryIO:
        try:
            return self.path(key).open("rb")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFoundError(f"{self.url}/{key} does not exist; check the store and the name") from error

    @contextmanager
    def _errors(self, operation: str, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}"
            raise StoreError(
                f"cannot {operation} {self.url}/{key}: {reason}; check space and permissions, then run it again"
            ) from error


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make_empty(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def _write_durably(path: Path, data: bytes | memoryview) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _copy_durably(source: BinaryIO, target: Path) -> None:
    with target.open("wb") as writer:
        shutil.copyfileobj(source, writer, 2**22)
        writer.flush()
        os.fsync(writer.fileno())
