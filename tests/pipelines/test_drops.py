"""Samples of what was rejected can be shown, with thumbnails."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.drops import THUMBNAIL, drop_samples
from starflow.objectstore import open_store
from starflow.snapshots import load_snapshot
from tests.pipelines.fake_crawl import Answer, Bench, png, url


def blank() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (256, 200), "white").save(file, "PNG")
    return file.getvalue()


#: What each URL is dropped for, the detail, and the thumbnail's width.
DROPPED: dict[str, tuple[Answer | list[Answer], str, str, int | None]] = {
    url("gone"): (("failed", "http_404", None, 404), "http_404", "HTTP 404", None),
    url("down"): (("retry", "timeout"), "timeout", "no answer", None),
    url("flaky"): ([("retry", "http_500", None, 500), png(9)], "", "", None),
    url("optout"): (("opt_out", "x_robots_tag", None, 200), "x_robots_tag", "HTTP 200", None),
    url("small"): (png(60, size=8), "too_small", "8 x 8 px", 8),
    url("blank"): (blank(), "blank", "spread 0.00", THUMBNAIL),
    url("secret"): (png(61), "blocked_word", f"picture at {url('secret')}", 32),
}


def test_each_reason_has_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch)
    answers: dict[str, Answer | list[Answer]] = {name: case[0] for name, case in DROPPED.items()}
    many = {url(f"missing-{index}"): ("failed", "http_410", None, 410) for index in range(20)}
    copies = {url(0): png(0), url("copy"): png(0)}
    result = bench.refresh(bench.write_list({**answers, **many, **copies}), block_words=("secret",))
    store = open_store(str(bench.store))
    found = drop_samples(store, load_snapshot(store).versions["refresh"], limit=3)
    assert set(found) == set(result.dropped)
    for name, (_, reason, detail, width) in DROPPED.items():
        if not reason:
            continue
        (drop,) = found[reason]
        assert (drop.url, drop.detail) == (name, detail)
        assert (drop.thumbnail is None) is (width is None)
        if drop.thumbnail is not None:
            assert Image.open(io.BytesIO(drop.thumbnail)).width == width
    assert len(found["http_410"]) == 3
    (copy,) = found["duplicate"]
    assert copy.thumbnail is not None
    shown = np.asarray(Image.open(io.BytesIO(copy.thumbnail)).convert("L"), np.float32)
    assert np.abs(shown - np.asarray(Image.open(io.BytesIO(png(0))).convert("L"), np.float32)).mean() < 20
    assert drop_samples(store, "99") == {}
