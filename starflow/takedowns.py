"""What was taken down, and must not come back with a later refresh."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from starflow import manifest
from starflow.errors import ConfigError
from starflow.manifest import ObjectRef
from starflow.objectstore import ObjectStore

#: What a removal can name: a sample id, an exact URL, or a host with all its subdomains.
KINDS = ("id", "url", "host")


class Takedowns:
    """A set of (kind, value); asking about a sample takes a few look-ups."""

    def __init__(self, entries: Iterable[tuple[str, str]] = ()) -> None:
        self.entries = frozenset((kind, value.lower() if kind != "url" else value) for kind, value in entries)
        unknown = {kind for kind, _ in self.entries} - set(KINDS)
        if unknown:
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
        if not self.entries:
            return np.zeros(len(ids), bool)
        return np.array([self._blocked(id, url) for id, url in zip(ids, urls, strict=True)], bool)

    def _blocked(self, id: str | None, url: str | None) -> bool:
        if (id and ("id", id.lower()) in self.entries) or (url and ("url", url) in self.entries):
            return True
        labels = host_of(url).split(".") if url else []
        return any(("host", ".".join(labels[start:])) in self.entries for start in range(len(labels)))


def parse_entry(line: str) -> tuple[str, str]:
    """(kind, value) of a line of a removal list: a URL, 64 hexadecimal digits (a sample id), or a host."""
    text = line.strip()
    if "://" in text:
        return "url", text
    return ("id" if re.fullmatch("[0-9a-fA-F]{64}", text) else "host"), text


def check_entry(kind: str, value: str) -> tuple[str, str]:
    """The entry. Raises ConfigError for an id or a host that no sample can have, which would take nothing down."""
    if kind == "id" and not re.fullmatch("[0-9a-fA-F]{64}", value):
        raise ConfigError(f"takedown of id {value!r}: a sample id has 64 hexadecimal digits; see samples.parquet")
    hosts = {host_of(f"http://{value}/"), host_of(f"http://[{value}]/")} - {""}
    if kind == "host" and value.lower() not in hosts:
        raise ConfigError(f"takedown of host {value!r}: write a name or address alone, such as example.org, or a URL")
    return kind, value


def host_of(url: str) -> str:
    """The host of a URL, lower case, without its port; empty for text that is no URL."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
