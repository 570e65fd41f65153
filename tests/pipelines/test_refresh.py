"""A refresh: incremental, counted, each URL a sample or a drop."""

from __future__ import annotations

import hashlib
from collections import Counter
from datetime import timedelta
from typing import Any

import pyarrow as pa
import pytest

from pipelines import batches, refresh
from starflow.errors import StarflowError
from starflow.manifest import ObjectRef
from starflow.objectstore import ObjectStore, open_store
from starflow.snapshots import list_snapshots, load_snapshot
from tests.pipelines.fake_crawl import (
    MIXED,
    MIXED_DROPS,
    Answer,
    Bench,
    ledger_rows,
    png,
    url,
)


def test_every_url_is_a_sample_or_a_counted_drop(bench: Bench) -> None:
    result = bench.refresh(bench.write_list(MIXED))
    assert (result.added, result.kept, result.total) == (6, 0, 6)
    assert result.dropped == MIXED_DROPS
    assert result.added + sum(result.dropped.values()) == len(MIXED)
    assert result.parent is None
    assert list(result.seconds) == ["plan", "crawl", "caption", "filter", "encode", "publish"]
    snapshot = load_snapshot(open_store(str(bench.store)))
    assert snapshot.id == result.snapshot
    assert snapshot.dropped == result.dropped
    assert snapshot.versions == {"captioner": "alt-text 1", "filters": "2", "refresh": "1", "plans": "2"}


def test_an_unchanged_list_costs_no_request_and_no_snapshot(bench: Bench) -> None:
    listed = bench.write_list(MIXED)
    first = bench.refresh(listed)
    before = bench.web.requests.total()
    second = bench.refresh(listed)
    assert bench.web.requests.total() == before
    assert (second.snapshot, second.added, second.kept, second.dropped) == (first.snapshot, 0, 6, {})
    assert len(list_snapshots(open_store(str(bench.store)))) == 1


def test_a_longer_list_fetches_only_what_is_new(bench: Bench) -> None:
    first = bench.refresh(bench.write_list(MIXED))
    asked = dict(bench.web.requests)
    second = bench.refresh(bench.write_list({**MIXED, url("new"): png(70), url("again"): png(1)}, "longer"))
    assert {name for name, count in bench.web.requests.items() if count != asked.get(name)} == {
        url("new"),
        url("again"),
    }
    assert (second.added, second.kept, second.parent) == (1, 6, first.snapshot)
    assert second.dropped == {"duplicate": 1}  # of a picture kept by the first refresh


def test_the_ledger_says_what_is_known_of_each_url(bench: Bench) -> None:
    bench.refresh(bench.write_list(MIXED))
    rows = ledger_rows(bench)
    assert set(rows) == set(MIXED)
    assert (rows[url("gone")]["status"], rows[url("gone")]["reason"]) == ("failed", "http_404")
    assert rows[url("optout")]["status"] == "opt_out"
    assert rows[url("flaky")]["status"] == "ok"
    assert (rows[url("down")]["status"], rows[url("down")]["attempts"]) == ("retry", 2)
    assert rows[url("down")]["next_retry"] > rows[url("down")]["last_seen"]
    assert sorted((rows[url("copy")]["dropped"], rows[url(0)]["dropped"])) == ["", "duplicate"]
    assert rows[url(1)]["id"] == hashlib.sha256(png(1)).hexdigest()


@pytest.mark.parametrize("reason", ["http_500", "timeout"])
def test_failures_are_retried_when_due_later_each_time_and_given_up_in_the_end(bench: Bench, reason: str) -> None:
    listed = bench.write_list({url(0): png(0), url("down"): ("retry", reason)})
    settings = {"retry_after": 100, "retry_rounds": 0, "max_attempts": 3}
    bench.refresh(listed, **settings)
    for seconds, requests, status in (
        (99, 1, "retry"),
        (1, 2, "retry"),
        (199, 2, "retry"),
        (1, 3, "failed"),
        (9999, 3, "failed"),
    ):
        bench.now += timedelta(seconds=seconds)
        assert bench.refresh(listed, **settings).added == 0
        assert (bench.web.requests[url("down")], ledger_rows(bench)[url("down")]["status"]) == (requests, status)
    assert bench.web.requests[url(0)] == 1


@pytest.mark.parametrize("reason", ["batch_time_limit", "crawl_lost", "host_busy", "robots_unavailable"])
def test_urls_that_were_never_asked_for_are_never_given_up(bench: Bench, reason: str) -> None:
    down: list[Answer] = [("retry", "http_500"), *[("retry", reason)] * 6, png(1)]
    listed = bench.write_list({url(0): png(0), url(1): down})
    for requests in (2, 4, 6):
        bench.refresh(listed, max_attempts=2)
        row = ledger_rows(bench)[url(1)]
        assert (bench.web.requests[url(1)], row["status"], row["attempts"]) == (requests, "retry", 1)
        bench.now += timedelta(seconds=900)  # never later than after the first failure
    assert bench.refresh(listed, max_attempts=2).added == 1


def test_a_long_retry_after_waits_for_a_later_refresh(bench: Bench) -> None:
    bench.refresh(bench.write_list({url(0): png(0), url("busy"): ("retry", "http_503", 7200.0)}))
    row = ledger_rows(bench)[url("busy")]
    assert bench.web.requests[url("busy")] == 1
    assert (row["next_retry"] - row["last_seen"]).total_seconds() == 7200


def test_retry_after_counts_from_the_answer_and_not_from_the_plan(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crawl may take days."""
    fetch = bench.web.fetch_batch

    def fetch_slowly(*arguments: Any) -> Any:
        bench.now += timedelta(hours=5)
        return fetch(*arguments)

    monkeypatch.setattr(bench.web, "fetch_batch", fetch_slowly)
    start = bench.now
    bench.refresh(bench.write_list({url(0): png(0), url("busy"): ("retry", "http_503", 7200.0)}))
    row = ledger_rows(bench)[url("busy")]
    assert (row["last_seen"], row["next_retry"]) == (start, start + timedelta(hours=7))


def test_repeated_urls_are_fetched_once(bench: Bench) -> None:
    spelled = {url(0): png(0), "HTTP://Pictures.example:80/0.png#top": png(0), url(1): png(1)}
    result = bench.refresh(bench.write_list(spelled))
    assert (result.added, result.dropped) == (2, {"duplicate_url": 1})
    assert bench.web.requests.total() == 2


def test_duplicates_are_found_across_windows_and_each_table_is_read_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.refresh(bench.write_list({url(0): png(0)}))
    reads: Counter[str] = Counter()
    get_table = batches.get_table

    def counted(store: ObjectStore, ref: ObjectRef) -> pa.Table:
        reads[ref.key] += "/samples-" in ref.key
        return get_table(store, ref)

    monkeypatch.setattr(refresh, "WINDOW_ROWS", 1)
    monkeypatch.setattr(batches, "get_table", counted)
    pictures = {url(name): png(seed) for name, seed in {1: 1, "one": 1, 2: 2, 3: 3, "two": 2, "zero": 0}.items()}
    result = bench.refresh(bench.write_list(pictures, "longer"), batch_size=1)
    assert (result.added, result.dropped) == (3, {"duplicate": 3})
    assert set(reads.values()) <= {0, 1}
    assert sum(reads.values()) == len(pictures) - 1


def test_near_duplicates_are_dropped_when_asked_for(bench: Bench) -> None:
    answers: dict[str, Answer | list[Answer]] = {url(0): png(0, 32), url("larger"): png(0, 64), url(1): png(1)}
    result = bench.refresh(bench.write_list(answers), near_duplicates=2)
    assert (result.added, result.dropped) == (2, {"near_duplicate": 1})


def test_blocked_hosts_are_never_asked_until_they_are_not_blocked(bench: Bench) -> None:
    listed = bench.write_list({url(0): png(0), "http://a.bad.example/1.png": png(1)})
    result = bench.refresh(listed, block_hosts=("bad.example",))
    assert (result.added, result.dropped) == (1, {"blocked_host": 1})
    assert bench.web.requests["http://a.bad.example/1.png"] == 0
    assert bench.refresh(listed).added == 1


def test_when_every_url_fails_nothing_is_published_and_all_is_asked_again(bench: Bench) -> None:
    listed = bench.write_list({url(0): ("retry", "connection"), url(1): ("failed", "http_404")})
    with pytest.raises(StarflowError, match=r"none of 2 URLs .*http_404 1"):
        bench.refresh(listed)
    assert not [info.key for info in open_store(str(bench.store)).list()]
    bench.web.answers |= {url(0): png(0)}
    assert bench.refresh(listed).added == 1


def test_beside_a_snapshot_a_refresh_without_new_samples_is_no_error(bench: Bench) -> None:
    first = bench.refresh(bench.write_list({url(0): png(0)}))
    listed = bench.write_list({url(0): png(0), url("gone"): ("failed", "http_404")}, "longer")
    second = bench.refresh(listed)
    assert (second.snapshot, second.added, second.dropped) == (first.snapshot, 0, {"http_404": 1})
    assert bench.refresh(listed).dropped == {}


def hosts(*answers: Answer) -> dict[str, Answer | list[Answer]]:
    """URLs on as many hosts."""
    return {f"http://host{number}.example/a.png": answer for number, answer in enumerate(answers)}


def test_beside_a_snapshot_a_dead_network_is_an_error(bench: Bench) -> None:
    first = bench.refresh(bench.write_list({url(0): png(0)}))
    down = hosts(("retry", "connection"), ("retry", "dns"), ("retry", "timeout"))
    listed = bench.write_list({url(0): png(0), **down}, "longer")
    with pytest.raises(StarflowError, match="check the network"):
        bench.refresh(listed)
    assert set(ledger_rows(bench)) == {url(0)}
    bench.web.answers |= hosts(png(1), png(2), png(3))
    assert bench.refresh(listed).parent == first.snapshot


def test_beside_a_snapshot_a_dead_host_or_two_are_remembered(bench: Bench) -> None:
    first = bench.refresh(bench.write_list({url(0): png(0)}))
    down = {**hosts(("retry", "connection"), ("retry", "dns")), "http://host0.example/b.png": ("retry", "connection")}
    listed = bench.write_list({url(0): png(0), **down}, "longer")
    assert bench.refresh(listed, retry_rounds=0).snapshot == first.snapshot
    assert {row["attempts"] for name, row in ledger_rows(bench).items() if name in down} == {1}


def test_beside_a_snapshot_a_server_that_answered_shows_that_the_network_works(bench: Bench) -> None:
    bench.refresh(bench.write_list({url(0): png(0)}))
    bench.now += timedelta(days=2)
    down = hosts(("retry", "connection"), ("retry", "dns"), ("retry", "timeout"))
    listed = bench.write_list({url(0): ("unchanged", "unchanged"), **down}, "longer")
    bench.refresh(listed, revalidate_days=1)
    assert len(ledger_rows(bench)) == 4


def test_private_addresses_name_the_setting_for_hosts_of_ones_own(bench: Bench) -> None:
    listed = bench.write_list({url(0): ("failed", "private_address"), url(1): ("failed", "http_404")})
    with pytest.raises(StarflowError, match="name it with --allow-host"):
        bench.refresh(listed)
