"""What is kept: a list of filters, each with the reason that its drops are counted by."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.config import RefreshConfig
from pipelines.texts import check_languages, in_languages
from starflow.errors import ConfigError

#: Raised when a filter changes what it keeps; published with each snapshot.
FILTERS_VERSION = "2"

#: Takes N fetched pictures (a row each) and says which to keep, (N,) bool.
Keep = Callable[[pa.Table], np.ndarray]


@dataclass(frozen=True)
class Filter:
    """Drops the pictures that `keep` does not keep, and counts them under `reason`."""

    reason: str
    keep: Keep


def build_filters(config: RefreshConfig) -> list[Filter]:
    """The filters that look at one picture's record alone, in the order they run.

    They read the columns width, height, spread and captions (list of struct with text).
    """
    filters = [
        Filter("too_small", lambda rows: _shorter(rows) >= config.min_size),
        Filter("aspect_ratio", lambda rows: _longer(rows) <= config.max_aspect_ratio * _shorter(rows)),
        Filter("blank", lambda rows: rows["spread"].to_numpy() >= config.min_spread),
        Filter("text_too_short", lambda rows: _by_text(rows, lambda text: len(text) >= config.min_text)),
        Filter("text_too_long", lambda rows: _by_text(rows, lambda text: len(text) <= config.max_text)),
    ]
    if config.block_words:
        words = "|".join(re.escape(word) for word in config.block_words)
        pattern = re.compile(rf"(?<!\w)(?:{words})(?!\w)", re.IGNORECASE)
        filters.append(
            Filter("blocked_word", lambda rows: _by_captions(rows, lambda texts: not any(map(pattern.search, texts))))
        )
    if config.languages:
        codes = check_languages(config.languages)
        filters.append(Filter("language", lambda rows: _by_text(rows, lambda text: in_languages(text, codes))))
    return filters


def apply_filters(rows: pa.Table, filters: Iterable[Filter]) -> np.ndarray:
    """The reason each row is dropped for, (N,) object, "" where it is kept; the first filter that drops it counts."""
    reasons = np.full(len(rows), "", dtype=object)
    for item in filters:
        kept = np.asarray(item.keep(rows), dtype=bool)
        reasons[~kept & (reasons == "")] = item.reason
    return reasons


def load_score(name: str) -> Callable[[list[Any], list[str]], list[float]]:
    """The callable ``module:function`` that scores PIL pictures with their captions. Raises ConfigError."""
    module, colon, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function) if colon else None
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"score {name!r} cannot be imported: {error}") from error
    if not callable(found):
        raise ConfigError(f"score {name!r} is not a function; write module:function")
    return found  # type: ignore[no-any-return]


def _shorter(rows: pa.Table) -> np.ndarray:
    return np.minimum(rows["width"].to_numpy(), rows["height"].to_numpy())


def _longer(rows: pa.Table) -> np.ndarray:
    return np.maximum(rows["width"].to_numpy(), rows["height"].to_numpy())


def _by_captions(rows: pa.Table, keep: Callable[[list[str]], bool]) -> np.ndarray:
    captions = rows["captions"].to_pylist()
    return np.array([keep([caption["text"] for caption in each]) for each in captions], dtype=bool)


def _by_text(rows: pa.Table, keep: Callable[[str], bool]) -> np.ndarray:
    return _by_captions(rows, lambda texts: keep(max(texts, key=len, default="")))
