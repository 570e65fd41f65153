"""Pictures that are there already: folders of image files and WebDataset tars, local or on S3, instead of a crawl.

They take the same way as fetched ones: listed, looked up in the ledger, inspected, filtered. Their URL is where they
lie; a picture in a tar is ``<tar>?offset=<bytes>&size=<bytes>#<name>``.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pyarrow as pa

from pipelines.crawl import OUTCOME
from pipelines.guard import FetchPolicy
from pipelines.inspection import InspectionError, inspect_image
from pipelines.sources import ROWS, Columns
from starflow.errors import ConfigError, NotFoundError
from starflow.objectstore import LocalStore, ObjectStore, open_store

PICTURES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"))
TEXTS = (".txt", ".json")
_BATCH_ROWS, _READERS, _TAR_BUFFER = 2**15, 16, 2**20

#: (location, caption, record) of one picture.
Sample = tuple[str, str, dict[str, Any]]


def read_samples(location: str, kind: str, columns: Columns) -> Iterator[pa.Table]:
    """Streams what is under `location`, kind ``images`` or ``webdataset``, as tables with the schema ROWS.

    Captions come from a text file beside the picture, or from the caption column of a JSON file beside it.
    Raises NotFoundError when nothing is there, ConfigError for a tar that cannot be read.
    """
    store, prefix = _open(location)
    samples = _images(store, prefix, columns) if kind == "images" else _webdataset(store, prefix, columns)
    found = False
    while chunk := list(islice(samples, _BATCH_ROWS)):
        found = True
        records = [
            {
                "url": url,
                "caption": caption,
                "licence": _text(record.get(columns.licence)),
                "extra": json.dumps({name: record.get(name) for name in columns.extra}) if columns.extra else None,
            }
            for url, caption, record in chunk
        ]
        yield pa.Table.from_pylist(records, ROWS)
    if not found:
        raise NotFoundError(f"no {kind} under {location}; give a folder of pictures, or of tars for webdataset")


def _open(location: str) -> tuple[ObjectStore, str]:
    """The store to list, and the prefix inside it: of a folder, or one object."""
    if location.startswith("s3://"):
        bucket, _, key = location.removeprefix("s3://").partition("/")
        store = open_store(f"s3://{bucket}")
        is_folder = not key or key.endswith("/") or store.head(key) is None
        return store, f"{key.rstrip('/')}/" if key and is_folder else key
    path = Path(location).expanduser().absolute()
    return (LocalStore(path.parent), path.name) if path.is_file() else (LocalStore(path), "")


def _url(store: ObjectStore, key: str) -> str:
    if isinstance(store, LocalStore):
        return f"file://{quote(str(store.root / key))}"
    return f"{store.url}/{quote(key)}"


def _images(store: ObjectStore, prefix: str, columns: Columns) -> Iterator[Sample]:
    groups = _groups((info.key, None) for info in store.list(prefix))

    def texts(item: tuple[str, dict[str, Any]]) -> dict[str, bytes]:
        return {suffix: store.read(item[0] + suffix) for suffix in TEXTS if suffix in item[1]}

    with ThreadPoolExecutor(_READERS) as pool:
        while chunk := list(islice(groups, 16 * _READERS)):
            for (stem, group), found in zip(chunk, pool.map(texts, chunk), strict=True):
                for suffix in sorted(PICTURES & group.keys()):
                    yield _url(store, stem + suffix), *_texts(found, columns, stem)


def _webdataset(store: ObjectStore, prefix: str, columns: Columns) -> Iterator[Sample]:
    for info in store.list(prefix):
        if info.key.endswith(".tar"):
            yield from _tar_samples(store, info.key, columns)


def _tar_samples(store: ObjectStore, key: str, columns: Columns) -> Iterator[Sample]:
    # The buffer makes one request of many: headers and texts are small, and lie between the pictures.
    file = io.BufferedReader(_ObjectFile(store, key), _TAR_BUFFER)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            members = ((member.name, (member, _member_text(tar, member))) for member in tar if member.isfile())
            for stem, group in _groups(members):
                texts = {suffix: group[suffix][1] for suffix in TEXTS if suffix in group}
                for suffix in sorted(PICTURES & group.keys()):
                    member = group[suffix][0]
                    place = f"?offset={member.offset_data}&size={member.size}#{quote(member.name)}"
                    yield _url(store, key) + place, *_texts(texts, columns, stem)
    except tarfile.TarError as error:
        raise ConfigError(f"{store.url}/{key} cannot be read as a tar: {error}; is the file complete?") from error


def _member_text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """The bytes of a caption file, read as the tar passes by; nothing of any other."""
    content = tar.extractfile(member) if member.name.lower().endswith(TEXTS) else None
    return content.read() if content is not None else b""


def _groups(files: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(common name, suffix to value) of files that lie beside each other and differ in suffix only."""
    stem, group = "", dict[str, Any]()
    for name, value in files:
        base, dot, suffix = name.rpartition(".")
        if base != stem and group:
            yield stem, group
            group = {}
        stem = base
        group[f"{dot}{suffix.lower()}"] = value
    if group:
        yield stem, group


def _texts(texts: dict[str, bytes], columns: Columns, stem: str) -> tuple[str, dict[str, Any]]:
    record: dict[str, Any] = {}
    if ".json" in texts:
        try:
            found = json.loads(texts[".json"])
        except ValueError as error:
            raise ConfigError(f"{stem}.json cannot be read as JSON: {error}") from error
        record = found if isinstance(found, dict) else {}
    caption = record.get(columns.caption or "") or texts.get(".txt", b"").decode("utf-8", "replace")
    return (_text(caption) or "").strip(), record


def _text(value: Any) -> str | None:
    """What a JSON file says, as text that can be stored: half of a surrogate pair cannot."""
    text = value if isinstance(value, str | None) else json.dumps(value)
    return text and text.encode("utf-8", "replace").decode()


def import_batch(
    urls: pa.Table, policy: FetchPolicy, folder: Path, on_progress: Callable[[int], None] = lambda done: None
) -> pa.Table:
    """Reads and inspects the pictures behind `urls` (column url); the same result as pipelines.crawl.fetch_batch."""
    (folder / "output").mkdir(parents=True)
    records: list[dict[str, Any]] = []
    with ThreadPoolExecutor(_READERS) as pool, (folder / "output" / "00000.bin").open("wb") as file:
        for row, (data, reason) in enumerate(_read_ahead(pool, urls["url"].to_pylist(), policy.max_bytes)):
            # `http` as a web server would have said it.
            http = 404 if reason == "missing" else 200
            record: dict[str, Any] = {"row": row, "status": "ok", "reason": "", "http": http}
            try:
                if reason:
                    raise InspectionError(reason)
                seen = inspect_image(data, policy.max_pixels, policy.max_frames)
            except InspectionError as error:
                record |= {"status": "failed", "reason": str(error)}
            else:
                record |= vars(seen) | {"id": hashlib.sha256(data).hexdigest(), "shard": 0}
                record |= {"offset": file.tell(), "size": len(data)}
                file.write(data)
            records.append(record)
            on_progress(row + 1)
    return pa.Table.from_pylist(records, OUTCOME)


def _read_ahead(pool: ThreadPoolExecutor, urls: list[str], max_bytes: int) -> Iterator[tuple[bytes, str]]:
    """What `_read` gives, in order; a few pictures at a time are in memory."""
    for first in range(0, len(urls), 2 * _READERS):
        yield from pool.map(lambda url: _read(url, max_bytes), urls[first : first + 2 * _READERS])


def _read(url: str, max_bytes: int) -> tuple[bytes, str]:
    """(the picture's bytes, ""), or (nothing, why not): missing, too_large."""
    parts = urlsplit(url)
    place = {name: int(values[0]) for name, values in parse_qs(parts.query).items()}
    path = unquote(parts.path)
    store, key = (LocalStore(Path("/")), path.lstrip("/"))
    if parts.scheme == "s3":
        store, key = open_store(f"s3://{parts.netloc}"), path.lstrip("/")  # type: ignore[assignment]
    try:
        size = place["size"] if place else _size(store, key)
        if size > max_bytes:
            return b"", "too_large"
        return store.read(key, place.get("offset"), place.get("size")), ""
    except NotFoundError:
        return b"", "missing"


def _size(store: ObjectStore, key: str) -> int:
    """The object's size. Raises NotFoundError."""
    info = store.head(key)
    if info is None:
        raise NotFoundError(f"{store.url}/{key} was deleted while it was listed; run the same command again")
    return info.size


class _ObjectFile(io.RawIOBase):
    """An object as a seekable file, so that a tar on S3 is listed by its headers without being downloaded."""

    def __init__(self, store: ObjectStore, key: str) -> None:
        self._store, self._key, self._size, self._position = store, key, _size(store, key), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence] + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), self._size - self._position)
        if length <= 0:
            return 0
        data = self._store.read(self._key, self._position, length)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
