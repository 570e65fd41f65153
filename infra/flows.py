"""Training and cleaning up as Prefect flows."""

from __future__ import annotations

import base64
import json
import queue
import shlex
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import psutil
import yaml
from prefect import flow, get_run_logger, task
from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE

from infra import processes
from infra.cleanup import CleanupConfig, clean_runs, clean_snapshots
from pipelines.flows import secrets_to_environment
from starflow.config import load_config
from starflow.errors import StarflowError
from starflow.forms import answer_rows, parameters_of
from starflow.objectstore import ObjectStore, open_store
from training.config import TrainConfig
from training.curves import draw_curves
from training.launch import PREEMPTED_STATUS
from training.metrics import read_metrics
from training.recipes import RECIPES
from training.run_commands import describe_run

#: Fields that the preset's recipe fills when the form leaves them empty.
RECIPE_FIELDS = frozenset(key for recipe in RECIPES.values() for key in recipe)
#: How long a cancelled training may take to save its checkpoint before its processes are killed, in seconds.
SAVE_SECONDS = 8.0
#: How often the metrics are looked at, in seconds.
LOOK_EVERY = 2.0


@flow(name="train")
@parameters_of(TrainConfig, optional=RECIPE_FIELDS, hidden=("cache",))
def train(**parameters: Any) -> dict[str, Any]:
    """Trains a run from a snapshot, or resumes it from its newest checkpoint. Empty fields come from the preset."""
    settings = plain(parameters)
    command = resume_command(settings)
    get_run_logger().info("the same from a shell: %s", command)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "train.yaml"
        file.write_text(yaml.safe_dump(settings), encoding="utf-8")
        config = load_config(TrainConfig, file)  # a bad value is refused before anything starts
        with child([sys.executable, "-m", "starflow.cli", "train", "--config", str(file)]) as (process, lines):
            last = follow(process, lines, Progress(config))
    # Whatever the outcome: what is committed can be looked at, and resumed.
    answer = publish(config, command) if open_store(config.store).head(f"runs/{config.run}/metrics.jsonl") else {}
    if process.returncode == PREEMPTED_STATUS:
        raise StarflowError(f"training saved and stopped as asked; run it again to go on: {command}")
    if process.returncode:
        raise StarflowError(own_error(last) or f"training ended with exit code {process.returncode} and no word")
    return answer


@flow(name="cleanup")
@parameters_of(CleanupConfig)
def cleanup(**parameters: Any) -> dict[str, Any]:
    """Deletes what no snapshot and no checkpoint needs any more; safe beside refreshes and training runs."""
    secrets_to_environment()
    config = CleanupConfig.model_validate(parameters)
    store = open_store(config.store)
    snapshots = snapshots_task(store, config)
    runs = runs_task(store, config)
    answer = snapshots | {"checkpoints": sum(map(len, runs.values())), "dry_run": config.dry_run}
    create_table_artifact(answer_rows(answer), key="cleanup-answer", description=f"Cleaned {config.store}")
    rows = [{"run": run, "steps": ", ".join(map(str, steps))} for run, steps in runs.items()]
    create_table_artifact(rows, key="cleanup-checkpoints", description="Checkpoints deleted, by run")
    return answer


@task(name="snapshots", task_run_name="snapshots", cache_policy=NO_CACHE)
def snapshots_task(store: ObjectStore, config: CleanupConfig) -> dict[str, Any]:
    """Old snapshots and unreferenced objects."""
    return clean_snapshots(store, config)


@task(name="checkpoints", task_run_name="checkpoints", cache_policy=NO_CACHE)
def runs_task(store: ObjectStore, config: CleanupConfig) -> dict[str, list[int]]:
    """Checkpoints of all runs."""
    return clean_runs(store, config)


def plain(parameters: dict[str, Any]) -> dict[str, Any]:
    """Parameters as the types that JSON and YAML share."""
    return {name: json.loads(json.dumps(value, default=str)) for name, value in parameters.items()}


def resume_command(settings: dict[str, Any]) -> str:
    """The command line that starts or resumes the same run wherever its store can be reached."""
    return shlex.join(["starflow", "train", *(f"{name}={json.dumps(value)}" for name, value in settings.items())])


@contextmanager
def child(command: Sequence[str]) -> Iterator[tuple[subprocess.Popen[str], queue.Queue[str | None]]]:
    """Runs `command` in a session of its own and yields it with a queue of its output lines (None: end).

    However the block ends, also by a cancellation, which Prefect raises in the main thread: the command is asked
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
        preexec_fn=processes.end_with_parent,  # also when this process is killed: two must not write one run
    )
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read_lines, args=(process, lines), daemon=True).start()
    try:
        yield process, lines
    finally:
        family = processes.descendants(psutil.Process(process.pid)) if process.poll() is None else []
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(SAVE_SECONDS)
        processes.stop([member for member in family if member.is_running()], seconds=1.0)
        process.wait()


def _read_lines(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line.rstrip())
    lines.put(None)


def follow(process: subprocess.Popen[str], lines: queue.Queue[str | None], progress: Progress) -> list[str]:
    """Copies the output into the run's log until it ends; returns its last lines."""
    log, last = get_run_logger(), list[str]()
    while True:
        try:
            line = lines.get(timeout=LOOK_EVERY)
        except queue.Empty:
            progress.update()
            continue
        if line is None:
            process.wait()
            progress.update()
            return last
        log.info(line)
        last = [*last[-20:], line]


def own_error(lines: Sequence[str]) -> str:
    """What a failed command said last: the sentence after `error:` if there is one."""
    said = [line for line in lines if line.strip()]
    errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
    return (errors or said or [""])[-1]


class Progress:
    """The progress artifact, kept up with the metrics that the run writes on this machine."""

    def __init__(self, config: TrainConfig) -> None:
        self._config, self._shown = config, -1
        first = create_progress_artifact(0.0, key="train-progress", description=f"{config.run}: starting")
        self._artifact = cast(UUID, first)

    def update(self) -> None:
        """Shows the newest step, if there is one that has not been shown."""
        file = self._config.folder / "metrics.jsonl"
        lines = read_metrics(file.read_bytes()) if file.exists() else []
        if not lines or lines[-1]["step"] == self._shown:
            return
        newest, steps = lines[-1], self._config.steps
        self._shown = newest["step"]
        text = f"{self._config.run}: step {self._shown} of {steps}, {newest['bits_per_dim']} bits/dim"
        update_progress_artifact(self._artifact, min(100.0 * self._shown / steps, 100.0), description=text)


def publish(config: TrainConfig, command: str) -> dict[str, Any]:
    """Artifacts of what is committed: curves, answer, how to resume. Returns the answer."""
    shown = describe_run(config.store, config.run)
    keys = ("run", "state", "step", "steps", "snapshot", "held_out_bits_per_dim", "restarts", "metrics_url")
    answer = {key: shown[key] for key in keys}
    create_table_artifact(answer_rows(answer), key="train-answer", description=f"Run {config.run}")
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "curves.png"
        draw_curves(open_store(config.store), [config.run], picture)
        encoded = base64.b64encode(picture.read_bytes()).decode()
    create_image_artifact(
        f"data:image/png;base64,{encoded}", key="train-curves", description=f"Curves of run {config.run}"
    )
    create_markdown_artifact(
        f"The newest checkpoint is step {answer['step']} of run `{config.run}` in `{config.store}`. To go on, retry "
        "this flow run, start this deployment with the same parameters, or on any machine that reaches the store:\n\n"
        f"```sh\n{command}\n```\n",
        key="train-resume",
        description="How to resume",
    )
    return answer
