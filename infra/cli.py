"""Commands that run on this machine's own stack: demo, doctor, up, down, status, prefect."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from starflow.console import console, print_json

StateDir = Annotated[
    Path | None,
    typer.Option(help="Folder of the stack's data, logs and state.", envvar="STARFLOW_HOME", show_default=".starflow"),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


def up(
    state_dir: StateDir = None,
    ui_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of the Prefect UI; a free one otherwise.")
    ] = None,
    json: Json = False,
) -> None:
    """Start the local stack and leave it running: S3, Prefect server and worker. Repeating it repairs it."""
    from infra.stack import LocalStack

    stack = LocalStack(state_dir, ui_port=ui_port)
    with console.status("starting the local stack") as line:
        state = stack.up(line.update)
    if json:
        print_json(stack.status())
        return
    console.print(
        f"[green]The local stack is up.[/] Prefect UI: [bold]{state.ui}[/]   stop it: starflow down", soft_wrap=True
    )
    console.print("To use it from this shell:")
    for name, value in state.env.items():
        print(f"export {name}={shlex.quote(value)}")
    print(f"export STARFLOW_STORE={shlex.quote(state.store)}")


def down(state_dir: StateDir = None, json: Json = False) -> None:
    """Stop the local stack. Its data stay."""
    from infra.stack import LocalStack

    stack = LocalStack(state_dir)
    stopped = stack.down()
    if json:
        print_json({"stopped": stopped})
    else:
        console.print(f"stopped {', '.join(stopped)}" if stopped else f"nothing was running in {stack.folder}")


def status(state_dir: StateDir = None, json: Json = False) -> None:
    """Show the local stack: what runs, its address, its logs."""
    from infra.stack import LocalStack

    answer = LocalStack(state_dir).status()
    if json:
        print_json(answer)
        return
    _print_status(answer)


def _print_status(answer: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("service", "pid", title=f"stack in {answer['state_dir']}")
    for name, pid in answer["services"].items():
        table.add_row(name, str(pid) if pid else "[red]stopped[/]")
    out = Console()
    out.print(table)
    if answer["running"]:
        out.print(f"Prefect UI {answer['ui']}   store {answer['store']}   logs {answer['logs']}", soft_wrap=True)
    else:
        out.print("start it with: starflow up")


def doctor(
    store: Annotated[str | None, typer.Option(help="Also check that this object store can be used.")] = None,
    json: Json = False,
) -> None:
    """Say what this machine lacks and how to get it. Exit code 1 when something needed is missing."""
    from infra.doctor import examine, print_findings

    findings = examine(store)
    failed = any(finding.state == "missing" for finding in findings)
    if json:
        print_json({"ok": not failed, "checks": [finding.model_dump() for finding in findings]})
    else:
        print_findings(findings)
    if failed:
        raise typer.Exit(1)


def demo(
    state_dir: StateDir = None,
    output: Annotated[Path, typer.Option(help="Folder for the report and the pictures.")] = Path("demo-output"),
) -> None:
    """Run the whole way once on this machine, from URLs to pictures."""
    from infra.demo.run import run_demo

    run_demo(output=output, state_dir=state_dir)


prefect = typer.Typer(help="Set up a Prefect server for this project.", no_args_is_help=True)


@prefect.callback()
def _prefect() -> None:
    """Set up a Prefect server for this project."""


@prefect.command()
def bootstrap(
    api_url: Annotated[str, typer.Option(help="The server, as http://HOST:PORT/api.", envvar="PREFECT_API_URL")],
    store: Annotated[
        str,
        typer.Option(
            help="First value of the variable starflow_store, the deployments' default store.", envvar="STARFLOW_STORE"
        ),
    ] = "s3://starflow",
    force: Annotated[bool, typer.Option("--force", help="Register again although nothing has changed.")] = False,
    json: Json = False,
) -> None:
    """Register work pool, limits, blocks, deployments, automations. Repeating it keeps what was changed in the UI."""
    from infra.bootstrap import bootstrap as register

    answer = register(api_url, store, force=force)
    if json:
        print_json(answer)
        return
    console.print(f"deployments {answer['deployments']}; their default store: {answer['store']}", highlight=False)
    for what, names in answer["automations"].items():
        for name in names:
            console.print(f"automation {what}: {name}", highlight=False)
