"""Captioners: pictures and their alt texts in, one caption a picture out."""

from __future__ import annotations

from typing import Protocol

from PIL import Image

from pipelines.config import RefreshConfig
from starflow.errors import ConfigError


class Captioner(Protocol):
    """Anything with a name, a version that changes when its captions would, and `caption`."""

    name: str
    version: str

    def caption(self, images: list[Image.Image], alts: list[str]) -> list[str]:
        """One caption for each picture, in order; an empty one when there is nothing to say."""
        ...


class AltText:
    """The list's own text, with white space made single."""

    name, version = "alt-text", "1"

    def caption(self, images: list[Image.Image], alts: list[str]) -> list[str]:
        """Ignores the pictures."""
        return [" ".join(alt.split()) for alt in alts]


def load_captioner(config: RefreshConfig) -> Captioner:
    """The captioner that the configuration names. Raises ConfigError for one that does not exist."""
    if config.captioner == "alt":
        return AltText()
    raise ConfigError(f"captioner {config.captioner!r} is not known; write alt")
