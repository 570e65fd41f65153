"""URL lists: Parquet, CSV, TSV, JSON lines or text, one file, a folder or a glob of them, local or on S3.

Lists are streamed: no step holds more of one than a batch of rows.
"""

from __future__ import annotations

import csv
import fnmatch
import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from starflow.config import Config
from starflow.errors import ConfigError, NotFoundError
from starflow.objectstore import open_store

FORMATS = ("parquet", "csv", "tsv", "jsonl", "ndjson", "txt")
ROWS = pa.schema([("url", pa.string()), ("caption", pa.string()), ("licence", pa.string()), ("extra", pa.string())])
_BATCH_ROWS = 2**15
_GLOB = frozenset("*?[")


class Columns(Config):
    """Which columns of a list hold what; `extra` ones are kept, as JSON, with each sample."""

    url: str = "url"
    caption: str | None = "caption"
    licence: str = "licence"
    extra: tuple[str, ...] = ()

    def required(self) -> list[str]:
        """Every column that must exist; the licence may be missing."""
        return [name for name in (self.url, self.caption, *self.extra) if name]

    def wanted(self) -> list[str]:
        """Every column to read, once."""
        return list(dict.fromkeys((*self.required(), self.licence)))


def list_files(location: str) -> list[str]:
    """The files behind a path, folder, glob, or the same on ``s3://``, sorted.

    Raises NotFoundError when there is none, ConfigError for a file whose format is not known.
    """
    files = _list_s3(location) if location.startswith("s3://") else _list_local(location)
    if not files:
        raise NotFoundError(
            f"no URL list at {location}; give a file, folder or glob of {', '.join(FORMATS)} (text may be .gz), or "
            "set source=images for a folder of pictures, source=webdataset for one of tars"
        )
    return files


def _list_local(location: str) -> list[str]:
    path = Path(location).expanduser()
    if path.is_dir():
        return sorted(str(file) for file in path.rglob("*") if file.is_file() and _is_list(file.name))
    if path.is_file():
        _format(path.name)
        return [str(path)]
    return sorted(file for file in glob.glob(str(path), recursive=True) if Path(file).is_file())


def _list_s3(location: str) -> list[str]:
    parts = urlsplit(location.replace("?", "%3F"))
    bucket, key = f"s3://{parts.netloc}", parts.path.lstrip("/").replace("%3F", "?")
    store = open_store(bucket)
    if _GLOB & set(key):
        fixed = key[: min(key.index(char) for char in _GLOB if char in key)]
        names = [info.key for info in store.list(fixed) if fnmatch.fnmatchcase(info.key, key)]
    elif key and not key.endswith("/") and store.head(key) is not None:  # some servers know folders as objects
        _format(key)
        names = [key]
    else:
        names = [info.key for info in store.list(f"{key.rstrip('/')}/" if key else "") if _is_list(info.key)]
    return sorted(f"{bucket}/{name}" for name in names)


def _is_list(name: str) -> bool:
    base = name.lower().rpartition("/")[2]
    return base.removesuffix(".gz").rpartition(".")[2] in FORMATS and not base.startswith((".", "_"))


def _format(name: str) -> str:
    suffix = name.lower().removesuffix(".gz").rsplit(".", 1)[-1]
    if suffix not in FORMATS:
        raise ConfigError(
            f"URL list {name} has no known format; name it .{', .'.join(FORMATS)}, or set source=images "
            "for pictures, source=webdataset for tars"
        )
    return suffix


def read_rows(file: str, columns: Columns, work: Path) -> Iterator[pa.Table]:
    """Streams one file as tables with the schema ROWS; `work` takes the copy of a file on S3.

    Raises ConfigError naming the file and what is wrong: unreadable, a column that it does not have, or a CSV row
    with more fields than the header.
    """
    kind = _format(file.rpartition("/")[2])
    path = _local_copy(file, work)
    try:
        if kind == "parquet":
            yield from _parquet(file, path, columns)
        elif kind == "txt":
            yield from _text(path)
        else:
            yield from _records(file, path, kind, columns)
    except (pa.ArrowException, csv.Error, ValueError, EOFError, OSError, zlib.error) as error:
        # pyarrow raises OSError for damaged pages, zlib an error of its own for damaged gzip.
        why = " ".join(str(error).split())
        raise ConfigError(
            f"URL list {file} cannot be read as {kind}: {why}; is the file complete? write it anew, or leave it out"
        ) from error
    finally:
        if path != Path(file):
            path.unlink(missing_ok=True)  # lists of many files would fill the disk


def _local_copy(file: str, work: Path) -> Path:
    if not file.startswith("s3://"):
        return Path(file)
    folder, _, name = file.rpartition("/")
    target = work / name
    open_store(folder).download(name, target)
    return target


def _parquet(file: str, path: Path, columns: Columns) -> Iterator[pa.Table]:
    with pq.ParquetFile(path) as parquet:
        wanted = _present(file, columns, parquet.schema_arrow.names)
        kind = parquet.schema_arrow.field(columns.url).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind)):
            raise ConfigError(f"URL list {file} has a column {columns.url!r} of {kind}, not of text; set url_column")
        for batch in parquet.iter_batches(_BATCH_ROWS, columns=wanted):
            yield _rows(batch.to_pydict(), columns)


def _records(file: str, path: Path, kind: str, columns: Columns) -> Iterator[pa.Table]:
    with _open_text(path) as text:
        records: Iterator[dict[str, Any]]
        if kind in ("csv", "tsv"):
            records = _csv_records(file, text, "\t" if kind == "tsv" else ",")
        else:
            records = (_json_object(number, line) for number, line in enumerate(text, 1) if line.strip())
        checked = False
        while chunk := list(islice(records, _BATCH_ROWS)):
            if not checked:
                # A record of JSON lines may lack what others have.
                _present(file, columns, list(dict.fromkeys(name for record in chunk for name in record)))
                checked = True
            yield _rows({name: [record.get(name) for record in chunk] for name in columns.wanted()}, columns)


def _csv_records(file: str, text: io.TextIOWrapper, delimiter: str) -> Iterator[dict[str, Any]]:
    reader = csv.DictReader(text, delimiter=delimiter, strict=True)
    for record in reader:
        if None in record:  # which column the surplus belongs to cannot be known
            raise ConfigError(
                f"URL list {file} has more fields in line {reader.line_num} than in its header; "
                f"quote text that contains {delimiter!r}"
            )
        yield record


def _text(path: Path) -> Iterator[pa.Table]:
    columns = Columns(caption=None)
    with _open_text(path) as text:
        lines = (line.strip() for line in text)
        urls = (line for line in lines if line and not line.startswith("#"))
        while chunk := list(islice(urls, _BATCH_ROWS)):
            yield _rows({"url": chunk}, columns)


def _open_text(path: Path) -> io.TextIOWrapper:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _json_object(number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} is no JSON: {line[:40]!r}") from error
    if not isinstance(record, dict):
        raise ValueError(f"line {number} holds no object: {line[:40]!r}")
    return record


def _present(file: str, columns: Columns, present: list[str]) -> list[str]:
    """The columns to read. Raises ConfigError for a required one that is missing."""
    for name in columns.required():
        if name not in present:
            raise ConfigError(
                f"URL list {file} has no column {name!r}, it has {', '.join(present) or 'none'}; "
                "set url_column, caption_column (null for none) or extra_columns"
            )
    return [name for name in columns.wanted() if name in present]


def _rows(chunk: dict[str, list[Any]], columns: Columns) -> pa.Table:
    count = len(chunk[columns.url])
    empty: list[Any] = [None] * count
    captions = chunk[columns.caption] if columns.caption else empty
    licences = chunk.get(columns.licence, empty)
    extras = [
        json.dumps({name: chunk[name][i] for name in columns.extra}, default=str, ensure_ascii=False)
        for i in range(count if columns.extra else 0)
    ]
    return pa.table(
        {
            "url": ["" if url is None else str(url) for url in chunk[columns.url]],
            "caption": ["" if text is None else str(text) for text in captions],
            "licence": [None if text is None else str(text) for text in licences],
            "extra": extras or empty,
        },
        schema=ROWS,
    )
