"""The demo's report: one HTML file with its pictures inside, and the sample grid as a PNG beside it."""

from __future__ import annotations

import base64
import io
import os
import platform
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont


@dataclass(frozen=True)
class StageTime:
    """A finished stage of the demo, as printed and as shown in the report."""

    title: str
    seconds: float
    detail: str


@dataclass(frozen=True)
class Scores:
    """Held-out likelihoods in bits per dimension, and how often the right caption beats another one."""

    count: int
    shuffles: int
    own: float
    shuffled: float
    none: float
    win_rate: float
    #: Standard error over pictures: the comparisons of one picture are not independent.
    win_rate_error: float


@dataclass(frozen=True)
class Column:
    """A column of the sample sheet; `apart` leaves a gap before it."""

    heading: str
    pictures: Sequence[Image.Image]
    apart: bool = False


#: Pixels of a picture on the sample sheet, and of the caption beside it.
PICTURE, CAPTION, GAP, HEADING = 96, 250, 6, 28


def sample_sheet(captions: Sequence[str], columns: Sequence[Column]) -> Image.Image:
    """One row a caption, one column a way of drawing it; pictures are enlarged without smoothing."""
    font = ImageFont.load_default(15)
    lefts, left = [], CAPTION
    for column in columns:
        left += 18 if column.apart else 0
        lefts.append(left)
        left += PICTURE + GAP
    sheet = Image.new("RGB", (left, HEADING + len(captions) * (PICTURE + GAP)), "white")
    pen = ImageDraw.Draw(sheet)
    for x, column in zip(lefts, columns, strict=True):
        pen.text((x + PICTURE // 2, HEADING // 2), column.heading, "#667085", ImageFont.load_default(12), anchor="mm")
        for row, picture in enumerate(column.pictures):
            enlarged = picture.resize((PICTURE, PICTURE), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (x, HEADING + row * (PICTURE + GAP)))
    for row, caption in enumerate(captions):
        text = textwrap.fill(caption, 30, max_lines=4, placeholder="...")
        middle = HEADING + row * (PICTURE + GAP) + PICTURE // 2
        pen.multiline_text((CAPTION - 12, middle), text, "#1d2330", font, anchor="rm", align="right")
    return sheet


@dataclass
class Report:
    """Everything the report shows."""

    attribution: str
    refreshes: Sequence[Mapping[str, Any]]
    run: Mapping[str, Any]
    scores: Scores
    grid: Image.Image
    guidances: Sequence[float]
    curves: bytes
    next_commands: Sequence[tuple[str, str]]
    stages: list[StageTime] = field(default_factory=list)

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Writes report.html and samples.png into `folder` and returns their paths."""
        from jinja2 import Environment, PackageLoader, StrictUndefined

        folder.mkdir(parents=True, exist_ok=True)
        picture, page = folder / "samples.png", folder / "report.html"
        png = io.BytesIO()
        self.grid.save(png, format="PNG", optimize=True)
        picture.write_bytes(png.getvalue())
        templates = Environment(loader=PackageLoader("infra.demo", "."), autoescape=True, undefined=StrictUndefined)
        values = vars(self) | {
            "grid": _data_uri(png.getvalue()),
            "curves": _data_uri(self.curves),
            "machine": f"{os.cpu_count()} cores ({platform.machine()})",
        }
        page.write_text(templates.get_template("report.html.j2").render(values), encoding="utf-8")
        return page, picture


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
