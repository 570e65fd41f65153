"""The commit rule shared by snapshots and checkpoints: parts first, then one manifest that names them all.

A manifest is a small JSON object created if absent; its existence *is* the commit. It names every part
with its size and SHA-256, and it carries a kind and a schema version: a reader refuses a newer one by name.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from starflow import __version__
from starflow.config import Config
from starflow.errors import CorruptError, StoreError
from starflow.objectstore import ObjectStore, file_sha256

C = TypeVar("C", bound=Config)


class ObjectRef(Config):
    """An immutable stored object: key, size in bytes and SHA-256 (hex) of its content."""

    key: str
    size: int
    sha256: str


def put(store: ObjectStore, key: str, data: bytes | memoryview) -> ObjectRef:
    """Writes `data` under `key` and returns the reference that a manifest may name."""
    store.write(key, data)
    return ObjectRef(key=key, size=len(data), sha256=hashlib.sha256(data).hexdigest())


def upload(store: ObjectStore, key: str, path: Path) -> ObjectRef:
    """Uploads the file at `path` under `key`; the file must not change meanwhile."""
    digest = file_sha256(path)
    store.upload(key, path)
    return ObjectRef(key=key, size=path.stat().st_size, sha256=digest)


def get(store: ObjectStore, ref: ObjectRef) -> bytes:
    """Reads the object and checks it. Raises NotFoundError, or CorruptError naming what differs."""
    data = store.read(ref.key)
    check(store, ref, len(data), hashlib.sha256(data).hexdigest())
    return data


def download(store: ObjectStore, ref: ObjectRef, path: Path) -> None:
    """Downloads the object to `path`, which appears only once its content has been checked."""
    partial = path.with_name(f"{path.name}.unchecked")
    digest = store.download(ref.key, partial)
    check(store, ref, partial.stat().st_size, digest)
    partial.replace(path)


def check(store: ObjectStore, ref: ObjectRef, size: int, sha256: str) -> None:
    """Raises CorruptError unless `size` and `sha256` are what `ref` promises."""
    if (size, sha256) != (ref.size, ref.sha256):
        raise CorruptError(
            f"{store.url}/{ref.key} is corrupt: {size} bytes with SHA-256 {sha256[:12]}, "
            f"its manifest says {ref.size} bytes with {ref.sha256[:12]}; restore it or use an older version"
        )


def commit(store: ObjectStore, key: str, kind: str, version: int, body: dict[str, Any]) -> None:
    """Creates the manifest; committing the same content twice is harmless.

    Raises AlreadyExistsError when the key holds a different manifest: somebody else committed first.
    """
    store.create(key, encode(kind, version, body))


def encode(kind: str, version: int, body: dict[str, Any]) -> bytes:
    """The manifest as it is stored: JSON."""
    manifest = {"kind": kind, "version": version, **body}
    return json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()


def load(store: ObjectStore, key: str, kind: str, version: int) -> dict[str, Any]:
    """Reads a manifest's body. Raises StoreError for another kind or a newer schema version."""
    try:
        manifest = json.loads(store.read(key))
        found_kind, found_version = manifest.pop("kind"), manifest.pop("version")
    except (ValueError, KeyError, AttributeError) as error:
        raise CorruptError(f"{store.url}/{key} is not a manifest ({error}); was it edited by hand?") from error
    if found_kind != kind:
        raise StoreError(f"{store.url}/{key} is a {found_kind} manifest, a {kind} was expected; check the name")
    if found_version > version:
        raise StoreError(
            f"{store.url}/{key} has {kind} schema version {found_version}, this release reads up to {version}; "
            "upgrade starflow"
        )
    return dict(manifest)


def load_as(model: type[C], store: ObjectStore, key: str, kind: str, version: int) -> C:
    """Reads a manifest as `model`. Raises StoreError also for fields that only another release has."""
    body = load(store, key, kind, version)
    try:
        return model.model_validate(body)
    except ValidationError as error:
        wrong = ", ".join(".".join(map(str, problem["loc"])) for problem in error.errors())
        writer = f"release {body['code']}" if "code" in body else "the release that wrote it"
        raise StoreError(
            f"{store.url}/{key} has fields that this release does not read ({wrong}); use {writer}, "
            f"this one is {__version__}"
        ) from error
