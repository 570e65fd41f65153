"""Command: refresh."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from starflow.console import console, print_json

#: Seconds between lines about a stage at work, where no bar can move.
SAY_EVERY = 10.0


def refresh(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings, such as image_size=64.")
    ] = None,
    urls: Annotated[
        str | None, typer.Option(help="Parquet, CSV, TSV, JSON lines or text; a file, folder or glob; local or s3://.")
    ] = None,
    store: Annotated[str | None, typer.Option(help="Folder or s3://BUCKET/PREFIX for the snapshots.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with settings.")] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Host of your own that may have a private address; may be repeated.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
) -> None:
    """Crawl, caption, filter, encode and publish what is new in a list of URLs.

    The same command again after an interruption goes on where it stopped.
    """
    from pipelines.config import RefreshConfig
    from pipelines.refresh import refresh as run
    from starflow.config import load_config

    settings = load_config(
        RefreshConfig, config, overrides or (), urls=urls, store=store, allow_host=allow_host or None
    )
    with StageBars() as bars:
        result = run(settings, bars.on_event)
    if json:
        print_json(result.model_dump())
        return
    dropped = ", ".join(f"{reason} {count}" for reason, count in sorted(result.dropped.items())) or "none"
    console.print(f"added {result.added}, kept {result.kept}, total {result.total}; dropped: {dropped}")
    print(result.snapshot)


class StageBars:
    """A progress bar per stage on stderr; one line each when done.

    Where stderr is no terminal, as in a log, a line when a stage starts and from time to time while it works.
    """

    def __init__(self) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._said = 0.0

    def __enter__(self) -> StageBars:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def on_event(self, event: dict[str, Any]) -> None:
        """Takes the events of pipelines.refresh."""
        stage = event["stage"]
        if event["event"] == "progress":
            self._progress.update(self._tasks[stage], completed=event["done"], total=event["total"])
            if time.monotonic() - self._said >= SAY_EVERY:
                self._say(f"{stage}: {event['done']:,} of {event['total'] or 'unknown'}")
        elif event["event"] == "stage" and event["state"] == "started":
            self._tasks[stage] = self._progress.add_task(stage, total=None)
            self._say(f"{stage} begins")
        elif event["event"] == "stage":
            self._progress.remove_task(self._tasks.pop(stage))
            console.print(f"{stage:<8} {event['seconds']:7.1f} s  {_summary(event['counts'])}", highlight=False)

    def _say(self, line: str) -> None:
        self._said = time.monotonic()
        if not console.is_terminal:
            console.print(line, highlight=False)


def _summary(counts: dict[str, Any]) -> str:
    parts = []
    for name, value in counts.items():
        if isinstance(value, dict) and name != "examples":
            parts += [f"{key} {count}" for key, count in sorted(value.items())]
        elif not isinstance(value, dict):
            parts.append(f"{name} {value}")
    return ", ".join(parts)
