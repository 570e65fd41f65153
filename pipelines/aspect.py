"""Aspect ratios as people write them: WIDTH:HEIGHT."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator

ASPECT_RATIOS = ("1:1", "3:2", "2:3", "4:3", "3:4", "16:9", "9:16", "21:9", "9:21")


def parse_aspect_ratio(text: object) -> float:
    """Width by height. Raises ValueError for what is not WIDTH:HEIGHT in whole numbers of at most four digits."""
    match = re.fullmatch(r"([1-9][0-9]{0,3}):([1-9][0-9]{0,3})", text) if isinstance(text, str) else None
    if match is None:
        # YAML reads 1:1 without quotes as a number of base 60.
        raise ValueError(f"aspect ratio {text!r} is not WIDTH:HEIGHT in quotes, such as '3:2'")
    return int(match[1]) / int(match[2])


def _checked(text: object) -> object:
    parse_aspect_ratio(text)
    return text


#: A configured aspect ratio, refused while the configuration is read.
AspectRatio = Annotated[str, BeforeValidator(_checked)]
