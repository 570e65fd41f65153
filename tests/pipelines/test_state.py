"""Where an interrupted refresh goes on when the store has changed meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.refresh import crawl, plan
from pipelines.state import RefreshState
from starflow.objectstore import open_store
from starflow.removal import take_down
from starflow.takedowns import Takedowns
from starflow.upkeep import collect_garbage
from tests.pipelines.fake_crawl import Bench, png, url


def test_it_goes_on_when_the_snapshot_that_it_was_planned_on_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, monkeypatch)
    first = bench.refresh(bench.write_list({url(n): png(n) for n in range(5)}))
    more = bench.write_list({url(n): png(n) for n in range(8)}, "more")
    (tmp_path / "work").mkdir()
    interrupted = RefreshState(bench.config(more), tmp_path / "work", lambda event: None)
    plan(interrupted)
    crawl(interrupted)
    store = open_store(bench.store)
    removal = take_down(store, Takedowns([("url", url(2))]))
    assert collect_garbage(store).snapshots == (first.snapshot,)
    second = bench.refresh(more)
    assert (second.parent, second.added, second.kept, second.total) == (removal.snapshot.id, 3, 4, 7)
    assert set(bench.web.requests.values()) == {1}
