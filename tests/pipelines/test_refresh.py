"""A refresh: incremental, counted, and the same after a kill at any of its writes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.encode_plan import EncodeConfig
from pipelines.ledger import Ledger, get_table
from pipelines.plan import Workspace
from pipelines.refresh import RefreshResult
from starflow import manifest
from starflow.errors import AlreadyExistsError, ConfigError, StarflowError
from starflow.manifest import ObjectRef
from starflow.objectstore import LocalStore, open_store
from starflow.snapshots import list_snapshots, load_snapshot, newest_snapshot, publish
from starflow.takedowns import Takedowns
from starflow.urls import url_key
from tests.pipelines.fake_crawl import Answer, Bench, fake_encode, png, url

#: Two batches, each kind of outcome once.
MIXED: dict[str, Answer | list[Answer]] = {
    **{url(index): png(index) for index in range(5)},
    url("copy"): png(0),
    url("gone"): ("failed", "http_404"),
    url("optout"): ("opt_out", "x_robots_tag"),
    url("flaky"): [("retry", "http_500"), png(50)],
    url("down"): ("retry", "timeout"),
    url("small"): png(60, size=8),
}
#: The same without the one that depends on how often it was asked.
STEADY = {name: answer for name, answer in MIXED.items() if name != url("flaky")}
MIXED_DROPS = {"duplicate": 1, "http_404": 1, "timeout": 1, "too_small": 1, "x_robots_tag": 1}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def ledger_rows(bench: Bench) -> dict[str, dict[str, Any]]:
    ledger = Ledger(open_store(str(bench.store)), 3)
    rows = [row for partition in range(ledger.partitions) for row in ledger.read(partition).to_pylist()]
    assert len({row["key"] for row in rows}) == len(rows)
    return {row["url"]: row for row in rows}


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


def sample_urls(bench: Bench) -> set[str]:
    """URLs of the newest snapshot's samples, each once."""
    store = open_store(str(bench.store))
    tables = [pq.read_table(pa.BufferReader(manifest.get(store, p.samples))) for p in load_snapshot(store).parts]
    urls = [url for table in tables for url in table["url"].to_pylist()]
    assert len(set(urls)) == len(urls)
    return set(urls)


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


def test_a_long_retry_after_waits_for_a_later_refresh(bench: Bench) -> None:
    bench.refresh(bench.write_list({url(0): png(0), url("busy"): ("retry", "http_503", 7200.0)}))
    row = ledger_rows(bench)[url("busy")]
    assert bench.web.requests[url("busy")] == 1
    assert (row["next_retry"] - row["last_seen"]).total_seconds() == 7200


def test_repeated_urls_are_fetched_once(bench: Bench) -> None:
    spelled = {url(0): png(0), "HTTP://Pictures.example:80/0.png#top": png(0), url(1): png(1)}
    result = bench.refresh(bench.write_list(spelled))
    assert (result.added, result.dropped) == (2, {"duplicate_url": 1})
    assert bench.web.requests.total() == 2


def test_near_duplicates_are_dropped_when_asked_for(bench: Bench) -> None:
    answers: dict[str, Answer | list[Answer]] = {url(0): png(0, 32), url("larger"): png(0, 64), url(1): png(1)}
    result = bench.refresh(bench.write_list(answers), near_duplicates=2)
    assert (result.added, result.dropped) == (2, {"near_duplicate": 1})


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


def test_blocked_hosts_are_never_asked_until_they_are_not_blocked(bench: Bench) -> None:
    listed = bench.write_list({url(0): png(0), "http://a.bad.example/1.png": png(1)})
    result = bench.refresh(listed, block_hosts=("bad.example",))
    assert (result.added, result.dropped) == (1, {"blocked_host": 1})
    assert bench.web.requests["http://a.bad.example/1.png"] == 0
    assert bench.refresh(listed).added == 1


def test_a_public_host_needs_a_contact(bench: Bench) -> None:
    with pytest.raises(ConfigError, match="contact"):
        bench.refresh(bench.write_list({url(0): png(0)}), contact="")
    assert bench.refresh(bench.write_list({url(0): png(0)}), contact="", allow_host=("pictures.example",)).added == 1


def test_other_latents_than_the_parents_are_refused_before_any_request(bench: Bench) -> None:
    bench.refresh(bench.write_list({url(0): png(0)}))
    listed = bench.write_list({url(0): png(0), url(1): png(1)}, "longer")
    with pytest.raises(ConfigError, match=r"hold 32 px latents of VAE emoji; set image_size=32, or"):
        bench.refresh(listed, image_size=64)
    with pytest.raises(ConfigError, match=r"set image_size=32 and vae=emoji, or use another store"):
        bench.refresh(listed, image_size=64, vae="other")
    assert bench.web.requests[url(1)] == 0
    assert bench.refresh(listed).added == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": "nowhere:f"}, "score 'nowhere:f' cannot be imported"),
        ({"languages": ("english",)}, "'english' is not known"),
        ({"captioner": "http://127.0.0.1:9/v1"}, "set captioner_model"),
    ],
)
def test_settings_that_later_stages_cannot_use_are_said_before_any_request(
    bench: Bench, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(StarflowError, match=message):
        bench.refresh(bench.write_list({url(0): png(0)}), **settings)
    assert not bench.web.requests


def test_an_empty_list_is_refused(bench: Bench) -> None:
    with pytest.raises(ConfigError, match="empty"):
        bench.refresh(bench.write_list({}))


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


def test_beside_a_snapshot_a_dead_network_is_an_error(bench: Bench) -> None:
    first = bench.refresh(bench.write_list({url(0): png(0)}))
    listed = bench.write_list({url(0): png(0), url(1): ("retry", "connection")}, "longer")
    with pytest.raises(StarflowError, match="check the network"):
        bench.refresh(listed)
    bench.web.answers |= {url(1): png(1)}
    assert bench.refresh(listed).parent == first.snapshot


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


def run_killed(bench: Bench, listed: Path, number: int, after: bool) -> RefreshResult | None:
    """None when the refresh was killed."""
    try:
        with killed_at_write(number, after):
            return bench.refresh(listed)
    except KilledError:
        return None


@pytest.mark.parametrize(
    ("after", "step"),
    [(True, 7), pytest.param(True, 1, marks=pytest.mark.slow), pytest.param(False, 1, marks=pytest.mark.slow)],
)
def test_a_kill_at_any_write_changes_nothing_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool, step: int
) -> None:
    calm = Bench(tmp_path / "calm", monkeypatch)
    calm.folder.mkdir()
    calm.refresh(calm.write_list(STEADY))
    for number in range(step, 200, step):
        bench = Bench(tmp_path / f"kill-{number}", monkeypatch)
        bench.folder.mkdir()
        listed = bench.write_list(STEADY)
        result = run_killed(bench, listed, number, after)
        if result is not None:
            break
        fetched = committed_urls(bench)
        asked = dict(bench.web.requests)
        bench.refresh(listed)
        assert content(bench) == content(calm), f"killed at write {number}"
        again = {name for name, count in bench.web.requests.items() if count != asked.get(name, 0)}
        assert not again & fetched, f"killed at write {number}: fetched again what was committed"
    assert number > 25


def committed_urls(bench: Bench) -> set[str]:
    """URLs whose batches are committed with an answer that is not to be retried."""
    from pipelines.batches import CrawlRecord, load_record

    store = open_store(str(bench.store))
    done = set()
    for plan in Workspace(store, 1).plans():
        for batch in plan.batches:
            record = load_record(store, batch, CrawlRecord)
            if record is not None:
                rows = get_table(store, record.fetched).to_pylist()
                done |= {row["url"] for row in rows if row["status"] != "retry"}
    return done


def test_a_list_that_changes_after_a_kill_adds_to_the_same_refresh(bench: Bench) -> None:
    assert run_killed(bench, bench.write_list(MIXED), 12, True) is None
    fetched = committed_urls(bench)
    assert fetched
    result = bench.refresh(bench.write_list({**MIXED, url("new"): png(70)}, "longer"))
    assert result.added == 7
    assert result.dropped == MIXED_DROPS
    assert all(bench.web.requests[name] == 1 for name in fetched)


def test_another_snapshot_published_meanwhile_is_built_upon(bench: Bench) -> None:
    store = open_store(str(bench.store))
    first = bench.refresh(bench.write_list({url(0): png(0)}))
    listed = bench.write_list({url(0): png(0), url(1): png(1)}, "longer")
    assert run_killed(bench, listed, 3, True) is None
    parent = newest_snapshot(store)
    assert parent is not None
    other = publish(store, parent=parent, parts=[*parent.parts, _another_part(parent.parts[0])], image_size=32)
    result = bench.refresh(listed)
    assert (result.parent, result.total) == (other.id, 3)
    assert first.snapshot != result.parent


def _another_part(part: Any) -> Any:
    return part.model_copy(update={"id": "other"})


def test_a_takedown_meanwhile_is_respected(bench: Bench) -> None:
    store = open_store(str(bench.store))
    bench.refresh(bench.write_list({url(0): png(0), url(1): png(1)}))
    listed = bench.write_list({url(0): png(0), url(2): png(2), url(3): png(3)}, "longer")
    assert run_killed(bench, listed, 12, True) is None
    parent = newest_snapshot(store)
    assert parent is not None
    taken: ObjectRef = Takedowns([("url", url(2))]).save(store)
    publish(store, parent=parent, parts=parent.parts, image_size=32, takedowns=taken)
    result = bench.refresh(listed)
    assert (result.added, result.total, result.dropped) == (1, 3, {"takedown": 1})


def test_what_another_process_planned_meanwhile_is_not_taken_for_published(bench: Bench) -> None:
    """The first one dies between its snapshot and its ledger; the second one's plan is not in that snapshot."""
    first, second = bench.write_list({url(0): png(0)}), bench.write_list({url(1): png(1)}, "other")
    with pytest.MonkeyPatch.context() as patch:

        def killed(*_: Any) -> None:
            raise KilledError

        patch.setattr(Ledger, "commit", killed)
        with pytest.raises(KilledError):
            bench.refresh(first)
    store = open_store(str(bench.store))
    workspace = Workspace(store, 1)
    rows = [get_table(store, batch.rows) for batch in workspace.plans()[0].batches]
    others = [
        table.set_column(0, "key", pa.array([url_key(url(1))])).set_column(1, "url", pa.array([url(1)]))
        for table in rows
    ]
    batches = workspace.write_batches(1, others, 4)
    workspace.commit(workspace.plans()[0].model_copy(update={"number": 1, "batches": batches}))
    result = bench.refresh(second)
    assert (result.added, result.total) == (1, 2)
    assert sample_urls(bench) == {url(0), url(1)}
    with pytest.raises(AlreadyExistsError, match="is at work and has planned meanwhile"):
        workspace.commit(workspace.plans()[0].model_copy(update={"duplicates": 7}))


def test_two_refreshes_at_once_publish_once(bench: Bench) -> None:
    listed = bench.write_list({url(0): png(0)})
    store = open_store(str(bench.store))
    ledger = Ledger(store, 3)
    bench.refresh(listed)
    with pytest.raises(AlreadyExistsError, match="run the same command again"):
        ledger.commit("another", {}, ())


def test_encode_settings_are_passed_on_by_name(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[EncodeConfig] = []

    def encode(store: Any, tables: Any, config: EncodeConfig, work: str, on_progress: Any) -> Any:
        seen.append(config)
        return fake_encode(store, tables, config, work, on_progress)

    monkeypatch.setattr("pipelines.encode.encode", encode)
    settings = {"image_size": 48, "patch": 2, "actors": 3, "gpus_per_actor": 0.5, "text_length": 9, "vae": "x"}
    bench.refresh(bench.write_list({url(0): png(0)}), **settings, ray_address="auto", vae_batch=7)
    assert seen[0].model_dump(include=set(settings)) == settings
    assert (seen[0].address, seen[0].vae_batch, seen[0].text_encoder) == ("auto", 7, "minilm")
    assert seen[0].aspect_ratios == EncodeConfig().aspect_ratios
