"""Languages of captions, and figures of their quality."""

from __future__ import annotations

import unicodedata

import pytest

from pipelines.texts import caption_quality, check_languages, in_languages, language_of
from starflow.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a photo of a cat in the garden", ("en",)),
        ("ein roter Apfel auf dem Tisch", ("de",)),
        ("une pomme rouge", ("fr",)),
        ("赤いリンゴ", ("ja",)),
        ("красный дом", ("ru",)),
        ("IMG_1234.jpg", ("en", "de", "fr", "ja", "ru")),  # says nothing, may be any
        ("", ("en", "de", "fr", "ja", "ru")),
    ],
)
def test_in_languages(text: str, expected: tuple[str, ...]) -> None:
    assert tuple(code for code in ("en", "de", "fr", "ja", "ru") if in_languages(text, (code,))) == expected
    assert in_languages(text, ("en", "de", "fr", "ja", "ru"))


def test_few_short_english_captions_are_lost() -> None:
    names = [unicodedata.name(chr(point), "").lower() for point in range(0x1F300, 0x1F650)]
    names = [name for name in names if name]
    assert sum(not in_languages(name, ("en",)) for name in names) < 0.04 * len(names)


def test_codes_are_checked() -> None:
    assert check_languages(("EN", "zh")) == ("en", "zh")
    with pytest.raises(ConfigError, match="'english' is not known"):
        check_languages(("english",))


def test_quality() -> None:
    texts = ["a photo of a cat in the garden", "ein roter Apfel auf dem Tisch", "x", "x", "", "", ""]
    assert language_of(texts[0]) == "en"
    assert caption_quality(texts) == {
        "pictures": 7,
        "empty": 3,
        "repeated": 1,
        "characters": sum(map(len, texts)),
        "language:de": 1,
        "language:en": 1,
        "language:unknown": 2,
    }
