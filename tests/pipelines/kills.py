"""Deaths of a refresh at a chosen change of its store, and what a store then holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from pipelines.batches import CrawlRecord, load_record
from pipelines.ledger import get_table
from pipelines.plan import Workspace
from starflow.objectstore import LocalStore, open_store
from starflow.snapshots import list_snapshots, load_snapshot
from tests.pipelines.fake_crawl import (
    Bench,
    ledger_rows,
)


class KilledError(BaseException):
    """Stands for SIGKILL: nothing in the code under test catches it."""


@contextmanager
def killed_at_write(number: int, after: bool) -> Iterator[None]:
    """The process dies at its `number`-th change of the store, before or after that change."""
    left = [number]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("write", "create", "upload", "delete"):
            original = getattr(LocalStore, name)

            def change(self: LocalStore, *arguments: Any, _original: Any = original) -> None:
                left[0] -= 1
                if left[0] == 0 and not after:
                    raise KilledError
                _original(self, *arguments)
                if left[0] == 0:
                    raise KilledError

            patch.setattr(LocalStore, name, change)
        yield


def content(bench: Bench) -> tuple[Any, ...]:
    """What two stores have in common when they hold the same."""
    store = open_store(str(bench.store))
    snapshots = [load_snapshot(store, str(summary.number)) for summary in list_snapshots(store)]
    rows = {name: (row["status"], row["reason"], row["dropped"], row["id"]) for name, row in ledger_rows(bench).items()}
    return [([part.id for part in s.parts], s.dropped, s.removed, s.counts) for s in snapshots], rows


def committed_urls(bench: Bench) -> set[str]:
    """URLs whose batches are committed with an answer that is not to be retried."""
    store = open_store(str(bench.store))
    done = set()
    for plan in Workspace(store, 1).plans():
        for batch in plan.batches:
            record = load_record(store, batch, CrawlRecord)
            if record is not None:
                rows = get_table(store, record.fetched).to_pylist()
                done |= {row["url"] for row in rows if row["status"] != "retry"}
    return done
