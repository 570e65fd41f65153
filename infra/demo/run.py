"""`starflow demo`: the whole way once, with the real components, as a newcomer would drive them.

Local stack, a small web to crawl, two refreshes through a Prefect deployment, training that is killed half-way
and resumes from S3, then samples and likelihoods in a report. Everything is kept between runs, so that a second
`make demo` finds its pictures, snapshots and checkpoints and only does what is missing.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from infra.demo.emoji import ATTRIBUTION
from infra.demo.report import Report, StageTime
from infra.services import last_line
from infra.stack import LocalStack, StackState
from starflow.config import load_config
from starflow.console import console
from starflow.errors import StarflowError
from training.config import TrainConfig
from training.launch import read_heartbeats

#: How the demo trains; everything else is the recipe's. Two ranks, so that one can be killed.
TRAINING = {"preset": "emoji", "ranks": 2, "zero_stage": 2, "seed": 0}
#: Guidance weights of the sample grid.
GUIDANCES = (0.0, 1.0, 2.0, 4.0)

Update = Callable[..., None]


def run_demo(output: Path, state_dir: Path | None = None) -> None:
    """Runs the demo; writes report.html, samples.png and train.yaml into `output`.

    Raises StarflowError naming the stage's failure and remedy; a repeated run goes on where it stopped.
    """
    previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the stack stops
    try:
        Demo(output, LocalStack(state_dir)).run()
    finally:
        signal.signal(signal.SIGTERM, previous)


class Demo:
    """The stages, in order, and what they hand to each other."""

    def __init__(self, output: Path, stack: LocalStack) -> None:
        self.output, self.stack = output.absolute(), stack
        self.stages: list[StageTime] = []
        self.state: StackState = stack.state

    def run(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        mine = not self.stack.status()["running"]  # a stack that the user has started stays up
        try:
            with self._stage("Start S3, Prefect server and worker") as update:
                self.state = self.stack.up(lambda message: update(text=message))
                self.stack.activate()
                update(detail=self.state.ui)
            with self._web() as lists:
                refreshes = [self._refresh(number, urls) for number, urls in enumerate(lists, start=1)]
            run = self._train(refreshes[-1]["snapshot"])
            self._report(refreshes, run)
        finally:
            if mine:
                with self._stage("Stop S3, Prefect server and worker") as update:
                    update(detail=f"{len(self.stack.down())} services stopped; data kept in {self.stack.folder}")
        self._farewell()

    @contextmanager
    def _stage(self, title: str) -> Iterator[Update]:
        """A progress bar while the stage works, one line when it is done."""
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[text]}"),
        )
        started, result = time.monotonic(), [""]
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task(title, total=None, text="")

            def update(*, detail: str | None = None, **changes: Any) -> None:
                if detail is not None:
                    result[0] = detail
                progress.update(task, **changes)

            yield update
        seconds = time.monotonic() - started
        self.stages.append(StageTime(title, seconds, result[0]))
        console.print(f"[green]✓[/] {title} [dim]{seconds:.1f} s[/]  {result[0]}", highlight=False, soft_wrap=True)

    @contextmanager
    def _web(self) -> Iterator[tuple[Path, Path]]:
        """Serves the pictures from a process of its own; yields the two URL lists."""
        from infra.demo.web import start_web

        with self._stage("Draw the emoji and serve them over HTTP") as update:
            web = start_web(
                self.stack.folder / "web", on_progress=lambda done, total: update(completed=done, total=total)
            )
            update(detail=f"{web.pictures} pictures at {web.address}, {web.hazards} hazards among the URLs")
        try:
            yield web.lists
        finally:
            web.stop()

    def _refresh(self, number: int, urls: Path) -> dict[str, Any]:
        from infra.prefect_client import run_refresh_deployment

        names = {1: "Crawl, caption, filter, encode, publish", 2: "Refresh again with a longer list"}
        with self._stage(names[number]) as update:
            parameters = {
                "urls": str(urls),
                "store": self.state.store,
                "allow_host": ["127.0.0.1"],
                "image_size": 32,
                "vae": "emoji",
                "text_encoder": "minilm",
                "text_length": 16,
                "attribution": ATTRIBUTION,
                "fetch_seconds": 5.0,  # the slow drip among the hazards need not take longer
            }
            result = run_refresh_deployment(self.state.env, parameters, on_state=lambda text: update(text=text))
            dropped = sum(result["dropped"].values())
            update(
                detail=f"snapshot {result['snapshot']}: {result['added']} added, {result['kept']} kept, "
                f"{dropped} dropped for {len(result['dropped'])} reasons"
            )
        return result

    def _train(self, snapshot: str) -> dict[str, Any]:
        """Trains in a child process, as a user would; kills one rank half-way with SIGKILL."""
        from training.run_commands import describe_run

        file, run = self.output / "train.yaml", f"emoji-{snapshot}"
        settings = {
            "store": self.state.store,
            "snapshot": snapshot,
            "run": run,
            **TRAINING,
            "cache": str(self.stack.folder / "cache"),
        }
        file.write_text(yaml.safe_dump(settings, sort_keys=False))
        config = load_config(TrainConfig, file)
        log = self.output / "train.log"
        with self._stage("Train on two ranks with DeepSpeed ZeRO; kill one, resume from S3") as update:
            with log.open("wb") as sink:
                command = [sys.executable, "-m", "starflow.cli", "train", "--config", str(file)]
                trainer = subprocess.Popen(command, stdout=sink, stderr=sink, start_new_session=True)
                try:
                    self._watch(trainer, config, update)
                finally:
                    _stop(trainer)
            if trainer.returncode:
                raise StarflowError(f"training failed: {last_line(log.read_text())} (whole log: {log})")
            found = describe_run(self.state.store, run)
            update(
                detail=f"{found['step']} steps, {found['restarts']} restart, "
                f"held out {found['held_out_bits_per_dim']:.3f} bits per dimension"
            )
        return found

    def _watch(self, trainer: subprocess.Popen[bytes], config: TrainConfig, update: Update) -> None:
        """Follows the training by the ranks' heartbeats; half-way, a little after a checkpoint, kills rank 1."""
        target = config.steps // 2 + config.checkpoint_every // 3
        killed = ""
        while trainer.poll() is None:
            step = _last_step(config.folder / "metrics.jsonl")
            update(completed=step, total=config.steps, text=killed)
            if not killed and target <= step < config.steps and _kill_rank(config.folder, rank=1):
                killed = f"killed rank 1 after step {step}"
            with suppress(subprocess.TimeoutExpired):
                trainer.wait(0.25)

    def _report(self, refreshes: list[dict[str, Any]], run: dict[str, Any]) -> None:
        from infra.demo.results import Results

        with self._stage("Score held-out pairs and draw held-out prompts") as update:
            results = Results(self.state.store, run["run"], self.stack.folder / "cache", update)
            scores, grid = results.score(), results.draw(GUIDANCES)
            update(detail=f"the right caption wins {100 * scores.win_rate:.0f} % of comparisons (chance 50 %)")
        self.report = Report(
            attribution=results.info.attribution or "",
            refreshes=refreshes,
            run=run | results.summary(),
            scores=scores,
            grid=grid,
            guidances=GUIDANCES,
            curves=results.curves(),
            next_commands=self._next_commands(run["run"]),
            stages=self.stages,
        )

    def _next_commands(self, run: str) -> list[tuple[str, str]]:
        beside = Path(sys.executable).with_name("starflow")
        starflow = "starflow" if shutil.which("starflow") else os.path.relpath(beside)
        config = os.path.relpath(self.output / "train.yaml")
        return [
            (f'eval "$({starflow} up)"', "start the stack again and point this shell at it"),
            (f'{starflow} sample "a red heart" --checkpoint {self.state.store}/{run}', "draw a picture"),
            (f"{starflow} train --config {config} run=longer steps=5000", "train longer"),
        ]

    def _farewell(self) -> None:
        page, picture = self.report.write(self.output)
        lines = [
            ("Report", str(page)),
            ("Pictures", str(picture)),
            ("Prefect UI", f"{self.state.ui} (once `starflow up` runs)"),
            *(("Try next" if not i else "", command) for i, (command, _) in enumerate(self.report.next_commands)),
        ]
        console.print()
        for name, value in lines:
            console.print(f"[bold]{name:12}[/]{escape(value)}", soft_wrap=True, highlight=False)


def _last_step(metrics: Path) -> int:
    """The last step in a metrics.jsonl that a trainer is writing; 0 before the first."""
    with suppress(OSError, ValueError, IndexError):
        return int(json.loads(metrics.read_bytes().rstrip().rsplit(b"\n", 1)[-1])["step"])
    return 0


def _kill_rank(folder: Path, rank: int) -> bool:
    """Kills a rank of the newest attempt; False when it has not begun or is gone."""
    attempts = sorted((folder / "attempts").glob("*"))
    beats = read_heartbeats(attempts[-1]) if attempts else {}
    if rank not in beats:
        return False
    with suppress(ProcessLookupError):
        os.kill(beats[rank][0], signal.SIGKILL)
        return True
    return False


def _stop(trainer: subprocess.Popen[bytes]) -> None:
    """Ends the trainer, after an error or Ctrl-C too; its supervisor takes the ranks with it."""
    if trainer.poll() is None:
        trainer.terminate()
        with suppress(subprocess.TimeoutExpired):
            trainer.wait(30)
            return
        os.killpg(trainer.pid, signal.SIGKILL)
        trainer.wait()
