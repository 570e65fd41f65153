"""The demo's report: one HTML file with its pictures inside, and the sample grid as a PNG beside it."""

from __future__ import annotations

import base64
import io
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class StageTime:
    """A finished stage of the demo, as printed and as shown in the report."""

    title: str
    seconds: float
    detail: str


@dataclass(frozen=True)
class Event:
    """Something that happened to the run; `time` is seconds since its start."""

    time: str
    text: str


@dataclass(frozen=True)
class Scores:
    """Held-out likelihoods in bits per dimension, and how often the right caption beats another one."""

    count: int
    shuffles: int
    own: float
    shuffled: float
    none: float
    win_rate: float

    @property
    def win_rate_error(self) -> float:
        """Standard error of the win rate, counting each picture once: its comparisons share the picture."""
        return (self.win_rate * (1 - self.win_rate) / self.count) ** 0.5


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
    events: Sequence[Event]
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
