"""Where an interrupted refresh goes on when the store has changed meanwhile."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from pathlib import Path

import pytest

from pipelines.refresh import crawl, plan
from pipelines.state import RefreshState
from starflow.objectstore import open_store
from starflow.removal import take_down
from starflow.takedowns import Takedowns
from starflow.upkeep import collect_garbage
from tests.pipelines.fake_crawl import Bench, png, url


def test_it_goes_on_when_the_snapshot_that_it_was_planned_on_is_deleted(bench: Bench, tmp_path: Path) -> None:
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


def test_what_was_taken_down_does_not_come_back_under_another_spelling(bench: Bench) -> None:
    """Neither the URL, whose picture has changed meanwhile, nor a host."""
    bench.refresh(bench.write_list({url(n): png(n) for n in range(3)}))
    spelled = "HTTP://Pictures.EXAMPLE:80/1.png#top"
    removal = take_down(open_store(bench.store), Takedowns([("url", spelled), ("host", "Other.example.")]))
    assert (removal.removed, removal.snapshot.counts.total) == (1, 2)
    more = bench.write_list({spelled: png(11), "http://a.OTHER.example:80/": png(12), url(5): png(5)}, "more")
    bench.now += timedelta(days=9)
    before = bench.web.requests.total()
    result = bench.refresh(more, revalidate_days=1)
    assert (result.added, result.total, result.dropped) == (1, 3, {"takedown": 2})
    assert bench.web.requests.total() == before + 1


@pytest.mark.parametrize("kind", ["id", "url"])
def test_what_was_taken_down_is_never_asked_for_again(bench: Bench, kind: str) -> None:
    """Also when it was named by its id; and only once it counts as dropped."""
    listed = bench.write_list({url(n): png(n) for n in range(3)})
    bench.refresh(listed)
    value = url(1) if kind == "url" else hashlib.sha256(png(1)).hexdigest()
    take_down(open_store(bench.store), Takedowns([(kind, value)]))
    dropped = []
    for _ in range(3):
        bench.now += timedelta(days=2)
        dropped.append(bench.refresh(listed, revalidate_days=1).dropped)
    assert bench.web.requests == {url(0): 4, url(1): 1, url(2): 4}
    assert dropped == [{"takedown": 1}, {}, {}]


def test_redirects_lead_to_no_blocked_host_and_none_that_was_taken_down(bench: Bench, tmp_path: Path) -> None:
    listed = bench.write_list({url(0): png(0), url(1): png(1)})
    bench.refresh(listed)
    take_down(open_store(bench.store), Takedowns([("host", "Gone.example"), ("url", url(1))]))
    state = RefreshState(bench.config(listed, block_hosts=("Blocked.example",)), tmp_path / "work", lambda event: None)
    assert state.policy.block_hosts == {"blocked.example", "gone.example"}
