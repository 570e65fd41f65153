"""Command: recaption."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.refresh_command import StageBars
from starflow.console import console, print_json


def recaption(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SNAPSHOT] [KEY=VALUE]...", help="The newest snapshot, and settings: weight=2."),
    ] = None,
    store: Annotated[str | None, typer.Option(help="Folder or s3://BUCKET/PREFIX with the snapshots.")] = None,
    captioner: Annotated[
        str | None, typer.Option(help="http(s) endpoint, or Hugging Face id or path; without it only weights change.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with settings.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
) -> None:
    """Publish a snapshot with new captions, or other weights of those it has; no latent is encoded again.

    The same command again after an interruption goes on where it stopped.
    """
    from pipelines.recaption import RecaptionConfig
    from pipelines.recaption import recaption as run
    from starflow.config import load_config

    given = list(arguments or ())
    snapshot = given.pop(0) if given and "=" not in given[0] else None
    settings = load_config(RecaptionConfig, config, given, store=store, captioner=captioner, snapshot=snapshot)
    with StageBars() as bars:
        result = run(settings, bars.on_event)
    if json:
        print_json(result.model_dump(mode="json"))
        return
    how = ", ".join(f"{kind} {count:,}" for kind, count in sorted(result.pictures.items())) or "none"
    console.print(f"captioned {result.captioned:,} ({how}), reused {result.reused:,}, total {result.total:,}")
    print(result.snapshot)
