"""`starflow train`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer


def train(
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings as key=value, over the file's.")] = None,
    config: Annotated[str | None, typer.Option(help="YAML file with the settings, or its s3:// URL.")] = None,
    init_from: Annotated[
        str | None, typer.Option("--from", help="Start a new run from this checkpoint: STORE/RUN or STORE/RUN@STEP.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run, check the store, stop.")] = False,
    machine: Annotated[
        str | None, typer.Option(help="With --dry-run: time and dollars on this kind of machine, such as h100.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON on stdout.")] = False,
) -> None:
    """Train a run, or resume it: the same command again goes on from the newest checkpoint that verifies."""
    from starflow.config import load_config
    from starflow.console import print_json
    from training.cluster import place_from_environment
    from training.config import TrainConfig
    from training.launch import PREEMPTED_STATUS
    from training.supervisor import Supervisor

    with _as_file(config) as file:
        settings = load_config(TrainConfig, file, overrides or (), init_from=init_from)
    if dry_run:
        _show_plan(settings, machine, as_json)
        return
    supervisor = Supervisor(settings, place_from_environment())
    outcome = supervisor.run()
    if as_json:
        from training.run_commands import describe_run

        print_json(describe_run(settings.store, settings.run))
    if outcome == "failed":
        raise typer.Exit(1)
    if outcome == "preempted" and not supervisor.told_to_end:
        raise typer.Exit(PREEMPTED_STATUS)


@contextmanager
def _as_file(config: str | None) -> Iterator[Path | None]:
    """The configuration as a file; machines that were launched read theirs from the store."""
    if config is None or "://" not in config:
        yield Path(config) if config else None
        return
    from starflow.objectstore import open_store

    folder, _, name = config.rpartition("/")
    with tempfile.TemporaryDirectory() as here:
        open_store(folder).download(name, Path(here) / name)
        yield Path(here) / name


def _show_plan(settings: Any, machine: str | None, as_json: bool) -> None:
    from starflow.console import print_json

    plan = dry_run_plan(settings, machine)
    if as_json:
        print_json(plan)
        return
    import yaml

    print(yaml.safe_dump(plan, sort_keys=False, allow_unicode=True), end="")


def dry_run_plan(settings: Any, machine: str | None = None) -> dict[str, Any]:
    """Resolved configuration, where it would begin, size, memory per rank, work; starts nothing.

    machine: kind of machine in the price table, for time and cost. Raises what the run itself would raise for its
    data, its first weights, another configuration than the run was started with, or a store that cannot be written.
    """
    from uuid import uuid4

    from starflow.checkpoints import list_steps
    from starflow.flops import parameters as count_parameters
    from starflow.flops import training_flops
    from starflow.objectstore import open_store
    from training.architecture import check
    from training.estimate import memory_per_rank, time_and_cost
    from training.record import adopt, own_snapshot

    store = open_store(settings.store)
    steps = list_steps(store, settings.run)
    if steps:
        settings = adopt(store, settings)
        own_snapshot(store, settings)
    flow, snapshot = check(store, settings)
    probe = f"probes/{uuid4().hex}"
    store.write(probe, b"can be written")
    store.delete([probe])
    parameters = count_parameters(flow)
    memory = memory_per_rank(parameters, settings.ranks, settings.zero_stage, settings.precision, settings.offload)
    flops = training_flops(flow) * settings.global_batch_size * settings.steps
    plan: dict[str, Any] = {
        "config": settings.model_dump(mode="json"),
        "begins": _beginning(settings, steps),
        "snapshot": snapshot.id,
        "samples_in_snapshot": snapshot.counts.total,
        "epochs": round(settings.steps * settings.global_batch_size / snapshot.counts.total, 3),
        "parameters": parameters,
        "memory_per_rank_bytes": {key: round(value) for key, value in memory.items()},
        "training_flops": flops,
        "checkpoint_bytes": 16 * parameters,
        "store_writable": True,
    }
    return plan | time_and_cost(flops, settings.ranks, settings.peak_tflops, machine)


def _beginning(settings: Any, steps: list[int]) -> str:
    """Where the run would begin, in words."""
    if not steps:
        return f"a new run, from the weights of {settings.init_from}" if settings.init_from else "a new run"
    return "complete: nothing is left to do" if steps[-1] >= settings.steps else f"resumes from step {steps[-1]}"
