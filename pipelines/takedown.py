"""Taking samples out of a store for good: what is named, what that finds, and the snapshot without it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from starflow import manifest
from starflow.config import Config
from starflow.errors import ConfigError, NotFoundError
from starflow.objectstore import ObjectStore, open_store
from starflow.removal import take_down
from starflow.snapshots import Snapshot, load_snapshot
from starflow.takedowns import Takedowns, check_entry, parse_entry


class TakedownConfig(Config):
    """What is to leave a store and never come back."""

    store: str = Field(title="Store", description="Where snapshots live: a folder or s3://BUCKET/PREFIX.", min_length=1)
    urls: tuple[str, ...] = Field((), title="URLs", description="Pictures at these URLs, however they are spelled.")
    hosts: tuple[str, ...] = Field(
        (), title="Hosts", description="Pictures of these hosts and their subdomains, such as example.org."
    )
    ids: tuple[str, ...] = Field(
        (), title="Sample ids", description="Pictures with these ids: SHA-256 of the file, 64 hexadecimal digits."
    )
    file: str | None = Field(
        None,
        title="List",
        description="Text file, local or on s3://, with a URL, host or id a line; # begins a comment line.",
    )
    dry_run: bool = Field(False, title="Dry run", description="Only count what would be taken down.")

    def entries(self) -> Takedowns:
        """All that is named. Raises ConfigError for nothing, and for what no sample can have."""
        named = [(kind, value) for kind, values in self._named().items() for value in values]
        if self.file is not None:
            lines = (line.strip() for line in _read(self.file).splitlines())
            named += [parse_entry(line) for line in lines if line and not line.startswith("#")]
        if not named:
            raise ConfigError("nothing to take down; name URLs, hosts, ids or a list (--url, --host, --id, --file)")
        return Takedowns(check_entry(*entry) for entry in named)

    def _named(self) -> dict[str, tuple[str, ...]]:
        return {"url": self.urls, "host": self.hosts, "id": self.ids}


class TakedownResult(Config):
    """What a takedown did, or a dry run found."""

    snapshot: str = Field(description="The snapshot without the samples; in a dry run the newest one.")
    parent: str | None
    removed: int = Field(description="Samples that left; in a dry run those that would.")
    total: int = Field(description="Samples of `snapshot`.")
    rules: dict[str, int] = Field(description="Samples found before, by what named them: {'host example.org': 12}.")
    withdrawn: int = Field(description="Withdrawn parts, with bytes of what was taken down, that are still stored.")


def takedown(config: TakedownConfig) -> TakedownResult:
    """Counts what is named in the newest snapshot and, unless it is a dry run, publishes one without it.

    Raises ConfigError for what cannot be taken down, NotFoundError for a list or store that is not there.
    """
    requested, store = config.entries(), open_store(config.store)
    newest = load_snapshot(store)
    rules = find(store, newest, requested)
    if config.dry_run:
        snapshot, removed = newest, sum(rules.values())
    else:
        removal = take_down(store, requested)
        snapshot, removed = removal.snapshot, removal.removed
    return TakedownResult(
        snapshot=snapshot.id,
        parent=snapshot.parent,
        removed=removed,
        total=snapshot.counts.total,
        rules=rules,
        withdrawn=sum(any(store.list(f"parts/{part}/")) for part in snapshot.withdrawn),
    )


def find(store: ObjectStore, snapshot: Snapshot, requested: Takedowns) -> dict[str, int]:
    """How many samples of the snapshot each entry names, 0 included, most first; each counts once."""
    found: Counter[str] = Counter(dict.fromkeys((f"{kind} {value}" for kind, value in sorted(requested.entries)), 0))
    for part in snapshot.parts:
        samples = pq.read_table(pa.BufferReader(manifest.get(store, part.samples)), columns=["id", "url"])
        rules = requested.rules(samples["id"].to_pylist(), samples["url"].to_pylist())
        found.update(f"{rule[0]} {rule[1]}" for rule in rules if rule)
    return dict(found.most_common())


def bytes_left(result: TakedownResult, store: str) -> str:
    """Sentences: where bytes of what was taken down still are, and from when on they are not."""
    parts = f"in {result.withdrawn} withdrawn parts, which older snapshots name, and " if result.withdrawn else ""
    return (
        f"Snapshot {result.snapshot} holds none of them, and none will come back. Their bytes may still be {parts}"
        "among the downloaded originals. From the end of the next run of the deployment cleanup (or of "
        f"`starflow snapshots gc --store {store}`) on, none are left there: withdrawn parts go whatever the "
        "grace period. What a refresh at work has downloaded, or one that its gate has refused, goes with the first "
        "such run after it has published or has been discarded. Caches of training nodes, and old object versions of a "
        "bucket, are deleted separately."
    )


def _read(file: str) -> str:
    """Text of a local file or one on S3. Raises ConfigError for one in another encoding, whose URLs would not match."""
    try:
        if file.startswith("s3://"):
            folder, _, name = file.rpartition("/")
            return open_store(folder).read(name).decode("utf-8-sig")
        return Path(file).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise NotFoundError(f"list {file} cannot be read: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"list {file} is not UTF-8 ({error.reason} at byte {error.start}); save it so") from error
