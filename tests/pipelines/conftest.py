"""Fixtures of the pipelines' tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipelines.fake_crawl import Bench


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A store, a list and a fake web."""
    return Bench(tmp_path, monkeypatch)
