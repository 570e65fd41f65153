"""Each filter alone, their order, and the score."""

from __future__ import annotations

import math
from typing import Any

import pyarrow as pa
import pytest

from pipelines.batches import CAPTIONS
from pipelines.config import RefreshConfig
from pipelines.filters import apply_filters, build_filters, load_score
from starflow.errors import ConfigError


def reason(text: str | list[str] = "a picture", **changes: Any) -> str:
    """Why one picture is dropped under settings that try every filter."""
    settings = {name: changes.pop(name) for name in list(changes) if name in RefreshConfig.model_fields}
    record = {"width": 64, "height": 64, "spread": 20.0, **changes}
    texts = [text] if isinstance(text, str) else text
    captions = [{"text": each, "origin": "alt-text", "version": "1", "weight": 1.0} for each in texts]
    rows = pa.table({**{k: [v] for k, v in record.items()}, "captions": pa.array([captions], CAPTIONS)})
    config = RefreshConfig(urls="-", store="-", **settings)
    return str(apply_filters(rows, build_filters(config))[0])


@pytest.mark.parametrize(
    ("expected", "arguments"),
    [
        ("", {}),
        ("too_small", {"height": 15}),
        ("", {"height": 16}),
        ("aspect_ratio", {"width": 257}),
        ("", {"width": 256}),
        ("blank", {"spread": 0.5}),
        ("text_too_short", {"text": ""}),
        ("text_too_short", {"text": []}),
        ("text_too_short", {"text": ["ab", "abc"], "min_text": 4}),
        ("text_too_long", {"text": "x" * 2001}),
        ("blocked_word", {"text": "a Stock-Photo here", "block_words": ("stock-photo",)}),
        ("", {"text": "restocked", "block_words": ("stock",)}),
        ("language", {"text": "ein roter Apfel auf dem Tisch", "languages": ("en", "fr")}),
        ("", {"text": "ein roter Apfel auf dem Tisch", "languages": ("en", "de")}),
        ("", {"text": "DSC 0042", "languages": ("en",)}),
        ("too_small", {"height": 2, "width": 900, "text": ""}),
    ],
)
def test_filters(expected: str, arguments: dict[str, Any]) -> None:
    assert reason(**arguments) == expected


def test_unknown_languages_are_refused() -> None:
    with pytest.raises(ConfigError, match="'english' is not known; use ISO 639 codes"):
        reason(languages=("english",))


@pytest.mark.parametrize("name", ["math", "math:nothing", "nothing_at_all:f", "math:pi"])
def test_a_score_that_is_no_function_is_one_sentence(name: str) -> None:
    with pytest.raises(ConfigError, match="score"):
        load_score(name)


def test_a_score_is_found() -> None:
    assert load_score("math:hypot") is math.hypot
