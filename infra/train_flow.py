"""Training as a Prefect flow."""

from __future__ import annotations

import contextlib
import json
import queue
import shlex
import tempfile
import threading
import time
from asyncio import CancelledError
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar, cast
from uuid import UUID

import httpx
from prefect import flow, get_run_logger
from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.exceptions import PrefectException, TerminationSignal

from infra.launch import Launch, LaunchConfig, active, logs, status, stop, submit
from pipelines.flows import secrets_to_environment
from pipelines.report import data_uri
from starflow.config import load_config
from starflow.errors import StarflowError, UnavailableError
from starflow.forms import answer_rows, fields_of, parameters_of
from starflow.objectstore import open_store
from training.config import TrainConfig
from training.curves import draw_curves
from training.recipes import RECIPES
from training.run_commands import describe_run

#: Fields that the preset's recipe fills when the form leaves them empty.
RECIPE_FIELDS = frozenset(key for recipe in RECIPES.values() for key in recipe)
#: How long a cancelled training may take to save its checkpoint before its processes are killed, in seconds.
SAVE_SECONDS = 8.0
#: Seconds between looks at the metrics, at machines whose log has nothing new, and between pages with new pictures.
LOOK_EVERY, ASK_EVERY, PAGE_EVERY = 2.0, 15.0, 600.0
#: The last bytes of the metrics in which their last line is looked for.
TAIL_BYTES = 2**14
#: What a store or Prefect's server out of reach raises.
OUT_OF_REACH = (UnavailableError, PrefectException, httpx.HTTPError, OSError)

T = TypeVar("T")


@flow(name="train")
@parameters_of(TrainConfig, LaunchConfig, optional=RECIPE_FIELDS, hidden=("cache",))
def train(**parameters: Any) -> dict[str, Any]:
    """Trains a run from a snapshot, or resumes it from its newest checkpoint. Empty fields come from the preset."""
    secrets_to_environment()
    settings = plain({name: value for name, value in parameters.items() if name in TrainConfig.model_fields})
    where = fields_of(LaunchConfig, parameters)
    config = load_config(TrainConfig, None, assignments(settings))  # a bad value is refused before anything starts
    command = launch_command(settings, where)
    get_run_logger().info("the same from a shell: %s", command)
    page = RunPage(config, where, command)
    import_what_a_page_needs()
    launch = active(config.store, config.run)
    if launch is not None:  # this flow's process had died, not the training
        get_run_logger().info("run %s is at work, launched at %s: following it", config.run, launch.submitted)
    else:
        with contextlib.chdir(Path.home()):  # training outlives this flow, whose own folder goes with it
            launch = submit(config, where)
    try:
        end = follow(launch, page.update)
    except (TerminationSignal, KeyboardInterrupt, CancelledError):  # cancelled; an error ends only what follows
        _Attempt(lambda: stop(launch, SAVE_SECONDS))()
        _Attempt(page.publish)()
        raise
    answer = page.publish()
    if end["state"] == "completed":
        return answer
    if end["state"] == "preempted":
        raise StarflowError(f"training saved and stopped as asked; run it again to go on: {command}")
    raise StarflowError(f"training ended as {end['state']}: {end['message'] or 'see the log'}; to go on: {command}")


def import_what_a_page_needs() -> None:
    """Before there is anything to stop: an import that a cancellation has interrupted cannot be made again."""
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401


def plain(parameters: dict[str, Any]) -> dict[str, Any]:
    """Parameters as the types that JSON and YAML share."""
    return {name: json.loads(json.dumps(value, default=str)) for name, value in parameters.items()}


def assignments(values: dict[str, Any]) -> list[str]:
    """``key=value``, as command lines take them: YAML reads JSON."""
    return [f"{name}={json.dumps(value)}" for name, value in values.items()]


def launch_command(settings: dict[str, Any], where: LaunchConfig) -> str:
    """The command line that starts or resumes the same run, on the same target, wherever its store can be reached."""
    chosen = where.model_dump(mode="json", exclude_defaults=True)
    cluster = chosen.pop("cluster", {})
    options = [f"--{name.replace('_', '-')}={value}" for name, value in ({"on": where.on} | chosen).items()]
    values = settings | {f"cluster.{name}": value for name, value in cluster.items()}
    return shlex.join(["starflow", "launch", *options, *assignments(values)])


def follow(launch: Launch, update: Callable[[], None]) -> dict[str, Any]:
    """Copies the log of the first machine into the run's log until all have ended; returns the launch's status.

    Goes on when the store, the machines or Prefect's server are out of reach for a while, as the training does, and
    when the page cannot be shown. Raises StarflowError when the run cannot be read any more.
    """
    show, ask = _Attempt(update), _Attempt(lambda: status(launch), OUT_OF_REACH)
    log, lines = get_run_logger(), queue.Queue[str | None]()
    threading.Thread(target=_read_log, args=(launch, lines), daemon=True).start()
    reading, asked = True, time.monotonic()
    while True:
        try:
            line = lines.get(timeout=LOOK_EVERY)
        except queue.Empty:
            show()
            if time.monotonic() - asked < ASK_EVERY and reading:
                continue
        else:
            reading = reading and line is not None
            if line is not None:
                log.info(line)
                continue
        asked, now = time.monotonic(), ask()
        if now and not now["alive"]:
            show()
            return now


class _Attempt(Generic[T]):
    """Calls what may fail for a while: None then, and a warning at the first failure in a row."""

    def __init__(self, call: Callable[[], T], errors: tuple[type[Exception], ...] = (StarflowError, *OUT_OF_REACH)):
        self._call, self._errors, self._failed = call, errors, False

    def __call__(self) -> T | None:
        try:
            answer = self._call()
        except self._errors as error:
            if not self._failed:
                get_run_logger().warning("going on all the same: %s", error)
            self._failed = True
            return None
        self._failed = False
        return answer


def _read_log(launch: Launch, lines: queue.Queue[str | None]) -> None:
    """Ends with None; a log that cannot be read does not end the training."""
    try:
        for line in logs(launch, follow=True):
            lines.put(line)
    except StarflowError as error:
        lines.put(f"the log cannot be followed: {error}")
    lines.put(None)


class RunPage:
    """What the run's page shows: progress step by step, and from time to time curves, samples and how to resume."""

    def __init__(self, config: TrainConfig, where: LaunchConfig, command: str) -> None:
        self._config, self._command = config, command
        self._store = open_store(config.store)
        # Of this machine's file while it trains here, else of the newest checkpoint.
        of_run = (self._store, f"runs/{config.run}/metrics.jsonl")
        self._metrics = (open_store(str(config.folder)), "metrics.jsonl") if where.on == "local" else of_run
        self._seen, self._published = "", time.monotonic()
        first = create_progress_artifact(0.0, key="train-progress", description=f"{config.run}: starting")
        self._artifact = cast(UUID, first)

    def update(self) -> None:
        """Shows the newest step, if there is one that has not been shown."""
        store, key = self._metrics
        info = store.head(key)
        if info is None or info.etag == self._seen:
            return
        newest = _last_line(store.read(key, start=max(0, info.size - TAIL_BYTES)) if info.size else b"")
        if newest:
            step, steps = newest["step"], self._config.steps
            text = f"{self._config.run}: step {step} of {steps}, {newest['bits_per_dim']} bits/dim"
            update_progress_artifact(self._artifact, min(100.0 * step / steps, 100.0), description=text)
        self._seen = info.etag
        if time.monotonic() - self._published > PAGE_EVERY:
            self.publish()

    def publish(self) -> dict[str, Any]:
        """Artifacts of what is committed: answer, curves, samples, how to resume. Returns the answer; {} before any."""
        self._published, config = time.monotonic(), self._config
        if self._store.head(f"runs/{config.run}/metrics.jsonl") is None:
            return {}
        shown = describe_run(config.store, config.run)
        keys = ("run", "state", "step", "steps", "snapshot", "held_out_bits_per_dim", "restarts", "metrics_url")
        answer = {key: shown[key] for key in keys}
        create_table_artifact(answer_rows(answer), key="train-answer", description=f"Run {config.run}")
        with tempfile.TemporaryDirectory() as folder:
            picture = Path(folder) / "curves.png"
            draw_curves(self._store, [config.run], picture)
            curves = data_uri(picture.read_bytes())
        create_image_artifact(curves, key="train-curves", description=f"Curves of run {config.run}")
        for key in shown["sample_grids"][-1:]:
            step = int(Path(key).stem)
            what = f"Samples of run {config.run} at step {step} for captions that it has not seen"
            create_image_artifact(data_uri(self._store.read(key)), key="train-samples", description=what)
        create_markdown_artifact(
            f"The newest checkpoint is step {answer['step']} of run `{config.run}` in `{config.store}`. To go on, "
            "retry this flow run, start this deployment with the same parameters, or on any machine that reaches the "
            f"store:\n\n```sh\n{self._command}\n```\n",
            key="train-resume",
            description="How to resume",
        )
        return answer


def _last_line(data: bytes) -> dict[str, Any]:
    """The last whole line; {} where there is none yet."""
    lines = data.split(b"\n")[:-1]
    return dict(json.loads(lines[-1])) if lines else {}
