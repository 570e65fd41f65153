"""Curves of runs as pictures, and how their configurations differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from starflow.errors import NotFoundError
from starflow.objectstore import ObjectStore
from training.metrics import read_metrics
from training.record import recorded

#: Panels: title, metric.
PANELS = (
    ("training, bits per dimension", "bits_per_dim"),
    ("held out, bits per dimension", "held_out_bits_per_dim"),
    ("gradient norm", "grad_norm"),
    ("images per second", "images_per_second"),
)


def run_metrics(store: ObjectStore, run: str) -> list[dict[str, Any]]:
    """The run's committed metric lines. Raises NotFoundError before its first checkpoint."""
    try:
        return read_metrics(store.read(f"runs/{run}/metrics.jsonl"))
    except NotFoundError as error:
        raise NotFoundError(f"run {run!r} in {store.url} has committed no metrics yet") from error


def draw_curves(store: ObjectStore, names: Sequence[str], out: Path) -> None:
    """Writes one picture with a panel per metric and a curve per run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = figure.subplots(2, 2).ravel()
    for name in names:
        lines = run_metrics(store, name)
        for axes, (title, metric) in zip(panels, PANELS, strict=True):
            points = [(line["step"], line[metric]) for line in lines if line.get(metric) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=name, linewidth=1)
            axes.set(title=title, xlabel="step")
    for axes in panels:
        axes.grid(alpha=0.3)
    panels[0].legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)


def compare_configs(store: ObjectStore, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Configuration keys whose values differ: key, then run, then value."""
    configs = {name: recorded(store, name) for name in names}
    keys = {key for config in configs.values() for key in config} - {"run"}
    values = {key: {name: config.get(key) for name, config in configs.items()} for key in sorted(keys)}
    return {key: found for key, found in values.items() if len({repr(value) for value in found.values()}) > 1}
