"""`starflow launch`: submit a run, then status, logs, stop."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer
from typer.core import TyperGroup

from starflow.console import console, print_json

Store = Annotated[str, typer.Option(help="Object store: s3://bucket/prefix or a folder.", envvar="STARFLOW_STORE")]
Run = Annotated[str, typer.Argument(help="Name of the run.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


class SubmitByDefault(TyperGroup):
    """`starflow launch --on ...` is `starflow launch submit --on ...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["submit", *args]
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """With the options of `submit`, which most people look for."""
        super().format_help(ctx, formatter)
        command = self.commands["submit"]
        command.format_help(type(ctx)(command, info_name="submit", parent=ctx), formatter)


launch = typer.Typer(
    cls=SubmitByDefault,
    help="Launch a run in the background, on one machine or many, and look after it. `starflow launch --on TARGET ...` "
    "is `starflow launch submit --on TARGET ...`, whose options follow.",
    no_args_is_help=True,
)


@launch.command()
def submit(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings of the run as key=value, over the file's; cluster.key=value for the target's."),
    ] = None,
    on: Annotated[str, typer.Option(help="local, ssh, slurm, kubernetes or ray.")] = "local",
    nodes: Annotated[int, typer.Option(help="Machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of each machine, a rank each; 0 for CPU ranks.")] = 0,
    ranks_per_node: Annotated[
        int | None, typer.Option(help="CPU ranks of each machine; the run's ranks / nodes if left out.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with the run's settings.")] = None,
    cluster: Annotated[Path | None, typer.Option(help="YAML file with the target's settings.")] = None,
    min_nodes: Annotated[int, typer.Option(help="Go on with as few machines as this while others stay away.")] = 1,
    patience: Annotated[int, typer.Option(help="Seconds to wait for absent machines before that.")] = 60,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be submitted, and stop.")] = False,
    machine: Annotated[str | None, typer.Option(help="With --dry-run: cost on this kind of machine.")] = None,
    as_json: Json = False,
) -> None:
    """Submit a run, or its continuation, and return at once with its name. The same command again resumes."""
    from infra.launch import LaunchConfig
    from infra.launch import submit as hand_over
    from starflow.config import load_config, read_yaml
    from training.config import TrainConfig

    given = list(overrides or ())
    where = [text for text in given if text.startswith("cluster.")]
    settings = load_config(TrainConfig, config, [text for text in given if text not in where])
    target = load_config(
        LaunchConfig,
        None,
        where,
        on=on,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        ranks_per_node=ranks_per_node,
        min_nodes=min_nodes,
        patience=patience,
        cluster=read_yaml(cluster) if cluster else {},
    )
    _warn_of_loopback(on)
    if dry_run:
        _show(settings, target, machine, as_json)
        return
    launched = hand_over(settings, target)
    if as_json:
        print_json(launched.model_dump(mode="json"))
        return
    print(launched.run)
    machines = "this machine" if on == "local" else _counted(nodes, "machine")
    console.print(
        f"launched on {on}: {_counted(launched.ranks, 'rank')} on {machines}. Look after it with\n"
        f"  starflow launch status | logs | stop {launched.run} --store {launched.store}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _warn_of_loopback(on: str) -> None:
    from training.cluster import LOOPBACK

    if on in ("local", "kubernetes"):  # pods do not get this shell's variables
        return
    name = "AWS_ENDPOINT_URL_S3" if os.environ.get("AWS_ENDPOINT_URL_S3") else "AWS_ENDPOINT_URL"
    endpoint = os.environ.get(name, "")
    if urlsplit(endpoint).hostname in LOOPBACK:
        _warn(f"{name} is {endpoint}: other machines do not reach it; set one that they do")


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _reached(answer: dict[str, Any]) -> str:
    saved = "nothing saved yet" if answer["step"] is None else f"saved up to step {answer['step']}"
    return f"{answer['run']}: {answer['state']}, {saved} of {answer['steps']}"


def _show(settings: Any, target: Any, machine: str | None, as_json: bool) -> None:
    from infra.launch import prepare
    from infra.launch.api import launcher
    from training.train_command import dry_run_plan

    prepared, config = prepare(settings, target)
    script = launcher(target).render(prepared)
    plan = dry_run_plan(config, machine)
    if as_json:
        print_json({"launch": prepared.model_dump(mode="json"), "submitted": script, "plan": plan})
        return
    import yaml

    print(yaml.safe_dump(plan, sort_keys=False, allow_unicode=True))
    print(script, end="")


@launch.command()
def status(run: Run, store: Store, as_json: Json = False) -> None:
    """What runs where, and how far it is."""
    from infra.launch import newest
    from infra.launch import status as look

    answer = look(newest(store, run))
    if as_json:
        print_json(answer)
        return
    print(f"{_reached(answer)}, {_counted(answer['ranks'], 'rank')}")
    print(f"launched {answer['submitted']} on {answer['on']}")
    if answer["message"]:
        print(answer["message"])
    for node in answer["nodes"]:
        state = "no answer" if node["state"] == "unknown" else node["state"]
        print(f"  machine {node['node']}  {state:9} {node['host']}  {node['detail']}".rstrip())


@launch.command()
def logs(
    run: Run,
    store: Store,
    node: Annotated[int, typer.Option(min=0, help="Machine, numbered from 0.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the machine has ended.")] = False,
) -> None:
    """What a machine's supervisor and ranks printed."""
    from infra.launch import logs as read
    from infra.launch import newest

    for line in read(newest(store, run), node, follow):
        print(line, flush=True)


@launch.command()
def stop(
    run: Run,
    store: Store,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to save; then it is ended.")] = 120.0,
    as_json: Json = False,
) -> None:
    """Save a checkpoint and stop on all machines. Launching again goes on from there.

    Exit status 1 if a machine is still at work or cannot be asked; the same command may be given again.
    """
    from infra.launch import newest
    from infra.launch import stop as end

    launched = newest(store, run)
    with console.status(f"stopping {run}"):
        answer = end(launched, timeout)
    if as_json:
        print_json(answer)
    else:
        print(_reached(answer))
    for node in (node for node in answer["nodes"] if node["node"] in answer["unreachable"]):
        _warn(
            f"machine {node['node']} {node['host']} cannot be asked whether it has stopped: {node['detail']}\n"
            "  The request is in the store; the machine saves and leaves when it sees it. Stop again once it answers."
        )
    if answer["alive"] and not answer["unreachable"]:
        _warn(f"{run} is still at work; look at starflow launch logs {run} --store {store}, then stop it again")
    if answer["alive"] or answer["unreachable"]:
        raise typer.Exit(1)


def _warn(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
