"""`starflow cluster`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from starflow.console import console, print_json

cluster = typer.Typer(help="Files for a cluster.", no_args_is_help=True)


@cluster.callback()
def _cluster() -> None:
    """Files for a cluster, all from one settings file."""


@cluster.command()
def render(
    settings: Annotated[Path, typer.Option(help="The cluster's settings; infra/cluster.yaml is an example.")],
    out: Annotated[Path, typer.Option(help="Folder for the files; those of an earlier rendering are replaced.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings as key=value, over the file's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the paths as JSON on stdout.")] = False,
) -> None:
    """Write everything a cluster needs: images, Kubernetes, Ray, Terraform, and what to type. Contacts nobody."""
    from infra.cluster.render import render as write
    from infra.cluster.settings import ClusterSettings
    from starflow.config import load_config

    files = write(load_config(ClusterSettings, settings, overrides or ()), out)
    if as_json:
        print_json([str(file) for file in files])
        return
    for file in files:
        print(file)
    console.print(f"what to type next: {out / 'NEXT.md'}", highlight=False)
