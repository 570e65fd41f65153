"""Measurements of a run: metrics.jsonl, TensorBoard and optionally W&B, one line a step and no step twice."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from starflow.console import console
from starflow.errors import ConfigError
from training.config import TrainConfig

Number = int | float


class MetricsLog:
    """Rank 0's log. `committed` is metrics.jsonl up to the step that the run resumes from, `pictures` its grids."""

    def __init__(
        self, config: TrainConfig, committed: bytes = b"", pictures: Iterable[tuple[int, Image.Image]] = ()
    ) -> None:
        config.folder.mkdir(parents=True, exist_ok=True)
        self.path = config.folder / "metrics.jsonl"
        self.path.write_bytes(committed)  # what an earlier attempt logged after its last checkpoint goes
        self._file = self.path.open("a", encoding="utf-8")
        self._writers: list[Any] = [_TensorBoard(config.folder / "tensorboard")]
        if config.wandb_project:
            self._writers.append(_WeightsAndBiases(config))
        for line in committed.splitlines():
            self._writers[0].write(json.loads(line))
        for step, picture in pictures:
            self._writers[0].picture(step, picture)

    def write(self, values: Mapping[str, Number | bool | None]) -> None:
        """Adds the line of one step; `values` holds "step"."""
        # JSON knows no NaN: a loss that is not finite is null.
        line = {k: None if isinstance(v, float) and not abs(v) < float("inf") else v for k, v in values.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for writer in self._writers:
            writer.write(line)

    def picture(self, step: int, picture: Image.Image) -> None:
        """Shows the grid of pictures drawn after `step`."""
        for writer in self._writers:
            writer.picture(step, picture)

    def close(self) -> None:
        """Flushes everything."""
        self._file.close()
        for writer in self._writers:
            writer.close()


class _TensorBoard:
    """Event files, written anew at each start from what was committed: resumed runs show no step twice."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(folder, ignore_errors=True)
        self._writer = SummaryWriter(str(folder))

    def write(self, line: Mapping[str, Any]) -> None:
        for key, value in line.items():
            if key != "step" and value is not None:
                self._writer.add_scalar(f"train/{key}", float(value), line["step"])

    def picture(self, step: int, picture: Image.Image) -> None:
        self._writer.add_image("samples", np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """The same numbers in a W&B run that bears the run's name; W&B drops steps it already has."""

    def __init__(self, config: TrainConfig) -> None:
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"wandb_project={config.wandb_project} needs the package wandb; pip install -e '.[tracking]'"
            ) from error
        try:
            self._run = wandb.init(
                project=config.wandb_project, id=config.run, resume="allow", config=config.model_dump(mode="json")
            )
        except wandb.errors.UsageError as error:
            raise ConfigError(
                f"W&B refuses wandb_project={config.wandb_project}: {error}; set WANDB_API_KEY, or WANDB_MODE=offline"
            ) from error

    def write(self, line: Mapping[str, Any]) -> None:
        self._run.log({k: v for k, v in line.items() if k != "step" and v is not None}, step=line["step"])

    def picture(self, step: int, picture: Image.Image) -> None:
        import wandb

        self._run.log({"samples": wandb.Image(picture)}, step=step)

    def close(self) -> None:
        self._run.finish()


class ProgressLine:
    """One live line in a terminal; elsewhere a plain line now and then."""

    def __init__(self, steps: int, every_seconds: float = 15.0) -> None:
        self._steps, self._every, self._last = steps, every_seconds, 0.0
        self._live = sys.stderr.isatty()

    def show(self, line: Mapping[str, Any]) -> None:
        """Shows the line of a step; in a log file only every so many seconds and at the end."""
        now, step = time.monotonic(), line["step"]
        if not self._live and now - self._last < self._every and step != self._steps:
            return
        self._last = now
        left = (self._steps - step) * line["seconds"]
        text = (
            f"step {step}/{self._steps}  {_shown(line['bits_per_dim'])} bits/dim  lr {line['lr']:.2e}  "
            f"{line['images_per_second']:.1f} images/s  {left / 60:.1f} min left"
        )
        if self._live:
            filled = 20 * step // self._steps
            sys.stderr.write(f"\r\x1b[K[{'=' * filled}{' ' * (20 - filled)}] {text}")
            sys.stderr.flush()
        else:
            console.print(text, highlight=False, soft_wrap=True)

    def end(self) -> None:
        """Leaves the live line standing."""
        if self._live and self._last:
            sys.stderr.write("\n")
            sys.stderr.flush()


def _shown(value: float | None) -> str:
    return "no finite" if value is None else f"{value:.4f}"


def read_metrics(data: bytes) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl."""
    return [json.loads(line) for line in data.splitlines() if line.strip()]
