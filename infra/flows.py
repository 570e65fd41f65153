"""Training as a Prefect flow: it launches the `starflow train` of the command line and shows how it goes."""

from __future__ import annotations

import base64
import io
import json
import queue
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import psutil
import yaml
from prefect import flow, get_run_logger
from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from infra import processes
from starflow.config import load_config
from starflow.errors import StarflowError
from starflow.forms import answer_rows, given, parameters_of
from starflow.objectstore import ObjectStore, open_store
from training.config import TrainConfig
from training.recipes import RECIPES

#: Fields that the preset's recipe fills when the form leaves them empty.
RECIPE_FIELDS = frozenset(key for recipe in RECIPES.values() for key in recipe)
#: How long a cancelled training may take to save its checkpoint before its processes are killed, in seconds.
SAVE_SECONDS = 10.0
#: How often the committed metrics are looked at, in seconds.
LOOK_EVERY = 5.0


@flow(name="train")
@parameters_of(TrainConfig, optional=RECIPE_FIELDS, hidden=("cache",))
def train(**parameters: Any) -> dict[str, Any]:
    """Trains a run from a snapshot, or resumes it from its newest checkpoint. Empty fields come from the preset."""
    values = given(parameters)
    config = load_config(TrainConfig, None, (), **values)
    log, store = get_run_logger(), open_store(config.store)
    log.info("the same from a shell: %s", resume_command(values))
    view = _RunView(store, config.run, config.steps)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "train.yaml"
        file.write_text(yaml.safe_dump(_plain(values)), encoding="utf-8")
        command = [sys.executable, "-m", "starflow.cli", "train", "--config", str(file)]
        with child(command) as (process, lines):
            last = _log_lines(process, lines, view)
    view.update(last=True)
    view.publish(resume_command(values))
    if process.returncode:
        raise StarflowError(own_error(last) or f"training ended with exit code {process.returncode}; see the log above")
    return view.answer()


def resume_command(values: dict[str, Any]) -> str:
    """The command line that starts or resumes the same run anywhere the store can be reached."""
    settings = [f"{name}={json.dumps(value)}" for name, value in _plain(values).items()]  # JSON is YAML
    return shlex.join(["starflow", "train", *settings])


@contextmanager
def child(command: Sequence[str]) -> Iterator[tuple[subprocess.Popen[str], queue.Queue[str | None]]]:
    """Runs `command` in a session of its own and yields it with a queue of its output lines (None: end).

    However the block ends - also by Prefect's cancellation, which raises in the main thread - the command is asked
    to save and stop, and after `SAVE_SECONDS` it and everything below it is killed.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read_lines, args=(process, lines), daemon=True).start()
    try:
        yield process, lines
    finally:
        if process.poll() is None:
            family = processes.descendants(psutil.Process(process.pid))
            process.terminate()
            _, left = psutil.wait_procs(family, timeout=SAVE_SECONDS)
            processes.stop(left, seconds=1.0)
        process.wait()


def _read_lines(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line.rstrip())
    lines.put(None)


def _log_lines(process: subprocess.Popen[str], lines: queue.Queue[str | None], view: _RunView) -> list[str]:
    """Copies the output into the run's log until it ends; returns its last lines."""
    log, last = get_run_logger(), list[str]()
    while True:
        try:
            line = lines.get(timeout=LOOK_EVERY)
        except queue.Empty:
            view.update()
            continue
        if line is None:
            process.wait()
            return last
        if line:
            log.info(line)
            last = [*last[-20:], line]
        view.update()


def own_error(lines: Sequence[str]) -> str:
    """The sentence after the last `error:` of a command's output, or nothing."""
    found = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return found[-1] if found else ""


class _RunView:
    """What the store says about a run, as artifacts of the flow run."""

    def __init__(self, store: ObjectStore, run: str, steps: int) -> None:
        self.store, self.run, self.steps = store, run, steps
        self.lines: list[dict[str, Any]] = []
        self._etag, self._looked = "", 0.0
        self._artifact = cast(UUID, create_progress_artifact(0.0, key="train-progress", description=f"run {run}"))

    def update(self, last: bool = False) -> None:
        """Reads the committed metrics when they have changed; at most every `LOOK_EVERY` seconds unless `last`."""
        if not last and time.monotonic() - self._looked < LOOK_EVERY:
            return
        self._looked = time.monotonic()
        key = f"runs/{self.run}/metrics.jsonl"
        info = self.store.head(key)
        if info is None or info.etag == self._etag:
            return
        self._etag = info.etag
        self.lines = [json.loads(line) for line in self.store.read(key).splitlines()]
        step = self.lines[-1]["step"] if self.lines else 0
        percent = min(100.0 * step / self.steps, 100.0)
        update_progress_artifact(self._artifact, percent, description=f"run {self.run}: step {step} of {self.steps}")

    def publish(self, command: str) -> None:
        """Loss curve, answer and how to resume."""
        if any("loss" in line for line in self.lines):
            create_image_artifact(
                loss_curve(self.lines), key="train-loss", description=f"Loss of run {self.run} by step"
            )
        create_table_artifact(answer_rows(self.answer()), key="train-answer", description=f"Run {self.run}")
        create_markdown_artifact(
            f"To resume or continue this run, run this deployment again with the same parameters, or:\n\n"
            f"```sh\n{command}\n```\n\nCheckpoints: `starflow checkpoints list {self.run} --store {self.store.url}`",
            key="train-resume",
            description="How to resume",
        )

    def answer(self) -> dict[str, Any]:
        """JSON: run, store, last committed step and loss."""
        trained = [line for line in self.lines if "loss" in line]
        return {
            "run": self.run,
            "store": self.store.url,
            "step": trained[-1]["step"] if trained else 0,
            "loss": trained[-1]["loss"] if trained else None,
        }


def loss_curve(lines: Sequence[dict[str, Any]]) -> str:
    """A line chart of the loss by step, as a data URI (PNG)."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    trained = [line for line in lines if "loss" in line]
    axes.plot([line["step"] for line in trained], [line["loss"] for line in trained], linewidth=1)
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    return "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Values as YAML's plain types."""
    return {name: json.loads(json.dumps(value, default=str)) for name, value in values.items()}
