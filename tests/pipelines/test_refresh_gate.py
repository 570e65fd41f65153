"""The automatic gate of a refresh: what becomes of a refused candidate, night after night, and the three ways on."""

from __future__ import annotations

import io
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.gate import GateRefusedError
from pipelines.refresh import RefreshResult
from starflow.errors import ConfigError
from starflow.objectstore import open_store
from starflow.snapshots import list_snapshots
from tests.pipelines.fake_captioners import COLOURS, serve_endpoint
from tests.pipelines.fake_crawl import Answer, Bench, png, url
from tests.pipelines.kills import KilledError, killed_at_write

GATE: dict[str, Any] = {"gate": "automatic", "gate_drop_rate": 0.4}
#: Two pictures and two URLs that give none: half is over the limit.
BAD: dict[str, Answer | list[Answer]] = {
    **{url(n): png(n) for n in range(2)},
    **{url(f"gone{n}"): ("failed", "http_404") for n in range(2)},
}


def refused(bench: Bench, listed: Path, **settings: Any) -> str:
    """Refreshes, expects a refusal, and returns the candidate that it names."""
    before = len(list_snapshots(open_store(bench.store)))
    with pytest.raises(GateRefusedError, match="the work is kept") as error:
        bench.refresh(listed, **{**GATE, **settings})
    assert len(list_snapshots(open_store(bench.store))) == before
    names = set(re.findall(r"\b\d+-[0-9a-f]{8}\b", str(error.value)))
    assert len(names) == 1
    return names.pop()


def expect_bad_is_published(bench: Bench, result: RefreshResult) -> None:
    assert (result.added, result.dropped) == (2, {"http_404": 2})
    assert set(bench.web.requests.values()) == {1}


def test_a_refused_refresh_is_published_with_another_limit(bench: Bench) -> None:
    listed = bench.write_list(BAD)
    refused(bench, listed)
    expect_bad_is_published(bench, bench.refresh(listed, **GATE | {"gate_drop_rate": 0.5}))


def test_the_next_night_measures_again_with_what_is_new(bench: Bench) -> None:
    """The refusal is said again at no cost while nothing is new, and ends when the share is small enough."""
    listed = bench.write_list(BAD)
    name = refused(bench, listed)
    assert refused(bench, listed) == name
    assert bench.web.requests.total() == 4
    longer = bench.write_list(BAD | {url(n): png(n) for n in range(2, 6)}, "longer")
    result = bench.refresh(longer, **GATE)
    assert (result.added, result.dropped) == (6, {"http_404": 2})
    assert set(bench.web.requests.values()) == {1}


def test_an_accepted_candidate_is_published_exactly_as_it_was_refused(bench: Bench) -> None:
    name = refused(bench, bench.write_list(BAD))
    longer = bench.write_list(BAD | {url(9): png(9)}, "longer")
    expect_bad_is_published(bench, bench.refresh(longer, **GATE, gate_accept=name))
    assert bench.web.requests[url(9)] == 0
    after = bench.refresh(longer, **GATE, gate_accept=name)
    assert (after.added, after.total) == (1, 3)


def test_a_name_decides_about_its_own_candidate_only(bench: Bench) -> None:
    name = refused(bench, bench.write_list(BAD))
    worse = bench.write_list(BAD | {url(3): png(3), url("gone3"): ("failed", "http_404")}, "worse")
    other = refused(bench, worse)
    assert other != name
    assert refused(bench, worse, gate_accept=name) == other
    assert refused(bench, worse, gate_discard=name) == other
    assert set(bench.web.requests.values()) == {1}


def test_without_a_gate_only_the_named_candidate_is_published(bench: Bench) -> None:
    """As in a form whose gate is off: a misspelt name, or settings that give another candidate, publish nothing."""
    listed = bench.write_list(BAD)
    name = refused(bench, listed)
    for decision in ("gate_accept", "gate_discard"):
        assert refused(bench, listed, gate="off", **{decision: "1-00000000"}) == name
    assert refused(bench, listed, gate="off") == name
    assert refused(bench, listed, gate="off", gate_accept=name, near_duplicates=3, block_words=("0",)) != name
    expect_bad_is_published(bench, bench.refresh(listed, gate="off", gate_accept=name))


def test_a_discarded_candidate_is_forgotten_and_its_urls_are_asked_anew(bench: Bench) -> None:
    listed = bench.write_list(BAD)
    name = refused(bench, listed)
    bench.web.answers |= {url("gone0"): png(20)}
    result = bench.refresh(listed, **GATE, gate_discard=name)
    assert (result.added, result.dropped) == (3, {"http_404": 1})
    assert set(bench.web.requests.values()) == {2}
    assert bench.refresh(listed, **GATE, gate_discard=name).snapshot == result.snapshot


@pytest.mark.parametrize("settings", [GATE, {"gate": "off"}])
def test_a_kill_while_forgetting_a_candidate_forgets_it(bench: Bench, settings: dict[str, Any]) -> None:
    listed = bench.write_list(BAD)
    name = refused(bench, listed)
    with pytest.raises(KilledError), killed_at_write(1, after=True):
        bench.refresh(listed, **settings, gate_discard=name)
    bench.web.answers |= {url("gone0"): png(20)}
    assert bench.refresh(listed, **settings, gate_discard=name).added == 3
    assert set(bench.web.requests.values()) == {2}


def test_too_many_removals_are_refused_though_nothing_is_new(bench: Bench) -> None:
    listed = bench.write_list(
        {url(n): [png(n), ("failed", "http_404", None, 404)] if n < 2 else png(n) for n in range(5)}
    )
    first = bench.refresh(listed, **GATE)
    bench.now += timedelta(days=2)
    name = refused(bench, listed, revalidate_days=1, gate_drop_rate=1, gate_removal_rate=0.3)
    result = bench.refresh(listed, **GATE, gate_accept=name)
    assert (result.parent, result.removed, result.total) == (first.snapshot, {"gone": 2}, 3)


def test_a_caption_that_alt_text_stands_in_for_counts_once(bench: Bench) -> None:
    """Two pictures refused by the captioner, with one alt text, and two that it captions alike."""
    pictures = {}
    for number, colour in enumerate(("red", "red", "green", "green")):
        picture, file = Image.open(io.BytesIO(png(number))), io.BytesIO()
        picture.paste(COLOURS[colour], (0, 0, 4, 4))  # where the endpoint looks
        picture.save(file, "PNG")
        pictures[url(number)] = file.getvalue()
    listed = bench.write_list(pictures)
    pq.write_table(pa.table({"url": list(pictures), "caption": ["photo"] * 4}), listed)
    with serve_endpoint() as endpoint:
        endpoint.refused = {"red": 422}
        captioner: dict[str, Any] = {"captioner": endpoint.url, "captioner_model": "seer"}
        with pytest.raises(GateRefusedError, match=r"captions 75\.0% .*; 3 of 4 captions"):
            bench.refresh(listed, **GATE, **captioner, gate_caption_rate=0.5)


def test_a_person_is_asked_in_the_browser_only(bench: Bench) -> None:
    with pytest.raises(ConfigError, match="gate=automatic"):
        bench.refresh(bench.write_list(BAD), gate="person")
    assert not bench.web.requests
