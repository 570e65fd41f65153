"""Pictures of a snapshot are asked for again: what stays, what leaves, what comes."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from pathlib import Path

import pytest

from starflow.errors import StarflowError
from tests.pipelines.fake_crawl import (
    Answer,
    Bench,
    ledger_rows,
    png,
    sample_urls,
    url,
)
from tests.pipelines.kills import KilledError, content, killed_at_write


def test_revalidation_keeps_what_has_not_changed_and_adds_what_has(bench: Bench) -> None:
    same: dict[str, Answer | list[Answer]] = {url(0): [png(0), ("unchanged", "unchanged")], url(1): png(1)}
    listed = bench.write_list({**same, url(2): [png(2), png(9)], url(3): [png(3), ("opt_out", "x_robots_tag")]})
    first = bench.refresh(listed, revalidate_days=30)
    before = ledger_rows(bench)
    bench.now += timedelta(days=29)
    assert bench.refresh(listed, revalidate_days=30).added == 0
    assert bench.web.requests.total() == 4
    bench.now += timedelta(days=2)
    result = bench.refresh(listed, revalidate_days=30)
    assert bench.web.requests.total() == 8
    assert (result.added, result.dropped) == (1, {"x_robots_tag": 1})
    assert (result.removed, result.kept, result.total) == ({"changed": 1, "opted_out": 1}, 2, 3)
    assert sample_urls(bench) == {url(0), url(1), url(2)}
    assert first.total == result.kept + sum(result.removed.values())
    after = ledger_rows(bench)
    for name in (url(0), url(1)):
        assert (after[name]["status"], after[name]["id"]) == ("ok", before[name]["id"])
        assert after[name]["last_seen"] == bench.now
        assert after[name]["first_seen"] == before[name]["first_seen"]
    assert after[url(2)]["id"] == hashlib.sha256(png(9)).hexdigest()
    assert after[url(3)]["status"] == "opt_out"


#: What a picture that is in a snapshot answers when it is asked again: what it leaves for, and the ledger's status.
ANSWERS: dict[str, tuple[Answer, str, str]] = {
    "not found": (("failed", "http_404", None, 404), "gone", "failed"),
    "gone": (("failed", "http_410", None, 410), "gone", "failed"),
    "illegal": (("failed", "http_451", None, 451), "gone", "failed"),
    "robots": (("opt_out", "robots_txt"), "opted_out", "opt_out"),
    "page": (("failed", "not_an_image", None, 200), "", "failed"),
    "too small": (png(60, size=8), "changed", "ok"),
    "forbidden": (("failed", "http_403", None, 403), "", "failed"),
    "down": (("retry", "http_503", None, 503), "", "retry"),
    "private": (("failed", "private_address"), "", "failed"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_what_leaves_at_revalidation_and_what_stays(bench: Bench, case: str) -> None:
    answer, reason, status = ANSWERS[case]
    settings = {"revalidate_days": 1, "retry_rounds": 0, "retry_after": 10}
    listed = bench.write_list({url(0): png(0), url(1): [png(1), answer, png(1)]})
    bench.refresh(listed, **settings)
    before = ledger_rows(bench)[url(1)]
    bench.now += timedelta(days=2)
    result = bench.refresh(listed, **settings)
    assert (result.added, result.kept, result.total) == (0, 1 if reason else 2, 1 if reason else 2)
    assert result.removed == ({reason: 1} if reason else {})
    assert sample_urls(bench) == ({url(0)} if reason else {url(0), url(1)})
    row = ledger_rows(bench)[url(1)]
    assert row["status"] == status
    assert (row["id"] == before["id"]) is not bool(reason)
    bench.now += timedelta(days=2)
    again = bench.refresh(listed, **settings)
    if case == "too small":  # the picture is back, and no duplicate of the one that left
        assert (again.added, again.total) == (1, 2)
    elif reason:
        assert bench.web.requests[url(1)] == 2
        assert (again.added, again.removed) == (0, {})
    else:
        assert (again.snapshot, again.dropped) == (result.snapshot, {})
        assert (ledger_rows(bench)[url(1)]["status"], ledger_rows(bench)[url(1)]["attempts"]) == ("ok", 0)


def test_a_duplicate_comes_in_when_the_picture_that_it_repeated_has_gone(bench: Bench) -> None:
    listed = bench.write_list({url(0): [png(0), ("failed", "http_404", None, 404)], url("copy"): png(0)})
    first = bench.refresh(listed, batch_size=1)
    gone = next(iter(sample_urls(bench)))
    bench.now += timedelta(days=2)
    if gone == url("copy"):  # which of the two comes first depends on their hashes
        bench.web.answers |= {url(0): png(0), url("copy"): ("failed", "http_404", None, 404)}
    second = bench.refresh(listed, batch_size=1, revalidate_days=1)
    assert (first.total, second.added, second.removed, second.total) == (1, 1, {"gone": 1}, 1)
    assert sample_urls(bench) == {url(0), url("copy")} - {gone}


def test_pictures_that_change_places_stay(bench: Bench) -> None:
    listed = bench.write_list({url(0): [png(0), png(1)], url(1): [png(1), png(0)], url(2): png(2)})
    bench.refresh(listed)
    bench.now += timedelta(days=2)
    result = bench.refresh(listed, revalidate_days=1)
    assert (result.added, result.removed, result.total) == (2, {"changed": 2}, 3)
    bench.now += timedelta(days=2)
    assert bench.refresh(listed, revalidate_days=1).snapshot == result.snapshot


def test_a_web_that_is_empty_all_at_once_publishes_nothing(bench: Bench) -> None:
    listed = bench.write_list({url(0): [png(0), ("failed", "http_404", None, 404), png(0)]})
    first = bench.refresh(listed)
    bench.now += timedelta(days=2)
    with pytest.raises(StarflowError, match=r"every sample of .* would leave \(gone 1\)"):
        bench.refresh(listed, revalidate_days=1)
    assert bench.refresh(listed, revalidate_days=1).snapshot == first.snapshot


def test_a_kill_at_any_write_of_a_revalidation_changes_nothing_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every third write; samples leave, come and stay."""
    answers: dict[str, Answer | list[Answer]] = {
        url(0): [png(0), ("unchanged", "unchanged")],
        url(1): [png(1), png(11)],
        url(2): [png(2), ("failed", "http_404", None, 404)],
        url(3): [png(3), ("retry", "timeout")],
    }

    def first_refresh(name: str) -> tuple[Bench, Path]:
        bench = Bench(tmp_path / name, monkeypatch)
        bench.folder.mkdir()
        listed = bench.write_list(answers)
        bench.refresh(listed)
        bench.now += timedelta(days=2)
        return bench, listed

    calm, listed = first_refresh("calm")
    expected = calm.refresh(listed, revalidate_days=1, retry_rounds=0)
    assert (expected.added, expected.total, expected.removed) == (1, 3, {"changed": 1, "gone": 1})
    for number in range(1, 200, 3):
        bench, listed = first_refresh(f"kill-{number}")
        try:
            with killed_at_write(number, True):
                bench.refresh(listed, revalidate_days=1, retry_rounds=0)
            break
        except KilledError:
            bench.refresh(listed, revalidate_days=1, retry_rounds=0)
        assert content(bench) == content(calm), f"killed at write {number}"
    assert number > 25
