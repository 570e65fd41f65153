"""A refresh that is killed at any of its writes, or is not alone, ends the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.ledger import Ledger, get_table
from pipelines.plan import Workspace
from pipelines.refresh import RefreshResult
from starflow.errors import AlreadyExistsError
from starflow.manifest import ObjectRef
from starflow.objectstore import open_store
from starflow.parts import LayerPlan, part_from_arrays
from starflow.snapshots import newest_snapshot, publish
from starflow.takedowns import Takedowns
from starflow.urls import url_key
from tests.pipelines.fake_captioners import serve_endpoint
from tests.pipelines.fake_crawl import (
    MIXED,
    MIXED_DROPS,
    STEADY,
    Bench,
    png,
    sample_urls,
    url,
)
from tests.pipelines.kills import KilledError, committed_urls, content, killed_at_write


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
    latents = np.zeros((1, *parent.parts[0].arrays["mean"].shape[1:]), np.float16)
    samples = pa.table({"id": ["0" * 64], "url": [url("other")]})
    layer = LayerPlan(origin="alt-text", version="1")
    part = part_from_arrays(store, parent.vae, latents, latents, samples, [(layer, ["another"])])
    other = publish(store, parent=parent, parts=[*parent.parts, part], image_size=32)
    result = bench.refresh(listed)
    assert (result.parent, result.total) == (other.id, 3)
    assert first.snapshot != result.parent


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

        def killed(*_: Any, **__: Any) -> None:
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


@pytest.mark.parametrize("stage", ["encode", "publish"])
def test_other_settings_after_a_kill_hold_for_all_that_is_not_published(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """What was captioned and filtered under the first ones is done again; nothing is fetched twice."""
    listed = bench.write_list({**{url(n): png(n) for n in range(6)}, url("small"): png(60, size=8)})

    def killed(*_: Any, **__: Any) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.encode.encode" if stage == "encode" else "pipelines.commit.snapshots.publish", killed)
        with pytest.raises(KilledError):
            bench.refresh(listed)
    with serve_endpoint() as endpoint:
        result = bench.refresh(listed, captioner=endpoint.url, captioner_model="seer", min_size=8)
    assert (result.added, result.dropped) == (7, {})
    assert set(bench.web.requests.values()) == {1}
    snapshot = newest_snapshot(open_store(bench.store))
    assert snapshot is not None
    assert snapshot.versions["captioner"].startswith("seer ")


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], str]]:
    """Tables and work of each call of the encoder, which dies at once."""
    calls: list[tuple[list[str], str]] = []

    def killed(store: Any, tables: list[str], config: Any, work: str, on_progress: Any) -> None:
        calls.append((tables, work))
        raise KilledError

    monkeypatch.setattr("pipelines.encode.encode", killed)
    return calls


def test_other_actors_go_on_with_the_same_encoding(bench: Bench, encodings: list[tuple[list[str], str]]) -> None:
    listed = bench.write_list({url(0): png(0)})
    for settings in ({}, {"actors": 5, "cpus_per_actor": 2, "vae_batch": 7, "ray_address": "auto"}, {"patch": 2}):
        with pytest.raises(KilledError):
            bench.refresh(listed, **settings)
    assert encodings[0] == encodings[1] != encodings[2]


def test_another_weight_of_alt_texts_asks_for_no_caption_again(
    bench: Bench, encodings: list[tuple[list[str], str]]
) -> None:
    listed = bench.write_list({url(0): png(0)})
    with serve_endpoint() as endpoint:
        for weight in (0.5, 0.25):
            with pytest.raises(KilledError):
                bench.refresh(listed, captioner=endpoint.url, captioner_model="seer", alt_weight=weight)
        assert len(endpoint.requests) == 1
    store = open_store(bench.store)
    captions = [pq.read_table(pa.BufferReader(store.read(tables[0])))["captions"] for tables, _ in encodings]
    weights = [[caption["weight"] for caption in each.to_pylist()[0]] for each in captions]
    assert weights == [[0.5, 1.0], [0.25, 1.0]]
