"""What was taken down, and must not come back with a later refresh."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from starflow import manifest
from starflow.errors import ConfigError
from starflow.manifest import ObjectRef
from starflow.objectstore import ObjectStore
from starflow.urls import host_alone, host_name, host_of, resource

#: What a removal can name: a sample id, a URL in any of its spellings, or a host with all its subdomains.
KINDS = ("id", "url", "host")
#: (kind, value).
Entry = tuple[str, str]


class Takedowns:
    """A set of entries in their canonical spelling; asking about a sample takes a few look-ups."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.entries = frozenset(map(_canonical, entries))
        self._kinds = {kind for kind, _ in self.entries}
        if unknown := self._kinds - set(KINDS):
            raise ConfigError(f"takedown by {sorted(unknown)} is not known; name an id, url or host")

    @classmethod
    def load(cls, store: ObjectStore, ref: ObjectRef | None) -> Takedowns:
        """Reads a snapshot's `takedowns`; None is the empty set."""
        if ref is None:
            return cls()
        table = pq.read_table(io.BytesIO(manifest.get(store, ref)))
        return cls(zip(table["kind"].to_pylist(), table["value"].to_pylist(), strict=True))

    def save(self, store: ObjectStore) -> ObjectRef:
        """Stores the set under a key that follows from its content."""
        kinds, values = zip(*sorted(self.entries), strict=True) if self.entries else ((), ())
        buffer = io.BytesIO()
        pq.write_table(pa.table({"kind": pa.array(kinds, pa.string()), "value": pa.array(values, pa.string())}), buffer)
        data = buffer.getvalue()
        digest = hashlib.sha256(data).hexdigest()
        return manifest.put(store, f"takedowns/{digest[:32]}.parquet", data)

    def __or__(self, other: Takedowns) -> Takedowns:
        return Takedowns(self.entries | other.entries)

    def blocks(self, ids: Sequence[str | None], urls: Sequence[str | None]) -> NDArray[np.bool_]:
        """Which of the samples are taken down."""
        return np.array([rule is not None for rule in self.rules(ids, urls)], bool)

    def rules(self, ids: Sequence[str | None], urls: Sequence[str | None]) -> list[Entry | None]:
        """For each sample the entry that takes it down, or None."""
        if not self.entries:
            return [None] * len(ids)
        return [next(self._matching(id, url), None) for id, url in zip(ids, urls, strict=True)]

    def _matching(self, id: str | None, url: str | None) -> Iterator[Entry]:
        if id and ("id", id.lower()) in self.entries:
            yield "id", id.lower()
        if url and "url" in self._kinds and ("url", resource(url)) in self.entries:
            yield "url", resource(url)
        labels = host_of(url).split(".") if url and "host" in self._kinds else []
        for start in range(len(labels)):
            if ("host", host := ".".join(labels[start:])) in self.entries:
                yield "host", host


def _canonical(entry: Entry) -> Entry:
    """The entry as samples are compared with it; one that none can match as it stands."""
    kind, value = entry
    if kind == "url":
        return kind, resource(value)
    try:
        return kind, host_name(value) if kind == "host" else value.lower()
    except ValueError:
        return kind, value.lower()


def parse_entry(line: str) -> Entry:
    """(kind, value) of a line of a removal list: a URL, 64 hexadecimal digits (a sample id), or a host."""
    text = line.strip()
    if "://" in text:
        return "url", text
    return ("id" if re.fullmatch("[0-9a-fA-F]{64}", text) else "host"), text


def check_entry(kind: str, value: str) -> Entry:
    """The entry. Raises ConfigError for what no sample can have, which would take nothing down."""
    if kind == "id" and not re.fullmatch("[0-9a-fA-F]{64}", value):
        raise ConfigError(f"takedown of id {value!r}: a sample id has 64 hexadecimal digits; see samples.parquet")
    if kind == "url" and "://" not in value:
        raise ConfigError(f"takedown of url {value!r}: write all of it, such as https://example.org/a.jpg")
    try:
        return kind, host_alone(value) if kind == "host" else value
    except ValueError as error:
        raise ConfigError(f"takedown of {kind} {value!r}: {error}") from error
