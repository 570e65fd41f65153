"""What is looked at in captions: their language, and figures of their quality."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from starflow.errors import ConfigError

#: A caption is in none of the wanted languages when another one is so many times as likely as all of them together.
#: Of one- and two-word captions, in which little tells, 2 % are lost.
LIKELIER = 20.0
#: Below this probability a caption's language counts as unknown.
_SURE = 0.5


@functools.cache
def _identifier() -> Any:
    # 140 languages, 50,000 short texts a second; naive Bayes over byte n-grams (Lui and Baldwin, "langid.py", 2012).
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def check_languages(codes: Iterable[str]) -> tuple[str, ...]:
    """The codes in lower case. Raises ConfigError for one that is not known."""
    wanted, known = tuple(code.lower() for code in codes), set(_identifier().labels)
    for code in wanted:
        if code not in known:
            raise ConfigError(f"language {code!r} is not known; use ISO 639 codes, such as en, de, zh or pt")
    return wanted


def in_languages(text: str, codes: Sequence[str]) -> bool:
    """Whether `text` may be in one of the languages; text that says too little for a verdict may."""
    ranked = _identifier().rank(text)
    likelihood = dict(ranked)
    return bool(ranked[0][1] <= LIKELIER * sum(likelihood[code] for code in codes))


def language_of(text: str) -> str:
    """The most probable language of `text`, as an ISO 639 code; "" when the text says too little."""
    code, probability = _identifier().classify(text)
    return str(code) if probability >= _SURE else ""


def repeats(texts: Iterable[str]) -> int:
    """How many captions repeat another one; empty ones do not count."""
    return sum(count - 1 for text, count in Counter(texts).items() if text)


def caption_quality(texts: Sequence[str]) -> dict[str, int]:
    """Figures of captions, one a picture, that add up over batches: how many there are, are empty, repeat another one,
    characters in all, and ``language:<code>`` (``language:unknown``: too short to tell)."""
    found = [text for text in texts if text]
    languages = Counter(language_of(text) or "unknown" for text in found)
    return {
        "pictures": len(texts),
        "empty": len(texts) - len(found),
        "repeated": repeats(found),
        "characters": sum(map(len, texts)),
        **{f"language:{code}": count for code, count in sorted(languages.items())},
    }
