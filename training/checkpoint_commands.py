"""`starflow checkpoints`: list, show, verify, export, prune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

checkpoints = typer.Typer(help="List, show, verify, export and prune checkpoints.", no_args_is_help=True)
Store = Annotated[str, typer.Option(help="Object store: s3://bucket/prefix or a folder.", envvar="STARFLOW_STORE")]
Step = Annotated[int | None, typer.Option(help="Step of the checkpoint; the newest if left out.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


@checkpoints.command("list")
def list_(run: str, store: Store, as_json: AsJson = False) -> None:
    """Committed checkpoints of a run, oldest first."""
    from starflow.checkpoints import list_runs, list_steps, load_manifest, no_checkpoints
    from starflow.console import print_json, show_value
    from starflow.objectstore import open_store

    opened = open_store(store)
    steps = list_steps(opened, run)
    if not steps and run not in list_runs(opened):
        raise no_checkpoints(opened, run)
    rows = [_summary(load_manifest(opened, run, step)) for step in steps]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        bits = show_value(row["held_out_bits"])
        print(f"step {row['step']:>9}  {row['created']}  {row['bytes'] / 1e6:.1f} MB  held out {bits}")


@checkpoints.command()
def show(run: str, store: Store, step: Step = None, as_json: AsJson = False) -> None:
    """The manifest of a checkpoint."""
    from starflow.console import print_json

    found = _load(store, run, step)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    for key, value in _summary(found).items():
        print(f"{key:14} {value}")


@checkpoints.command()
def verify(run: str, store: Store, step: Step = None, as_json: AsJson = False) -> None:
    """Read every object of a checkpoint and compare it with its checksum."""
    from starflow.checkpoints import verify as check
    from starflow.console import print_json
    from starflow.objectstore import open_store

    found = _load(store, run, step)
    total = check(open_store(store), found)
    if as_json:
        print_json({"run": run, "step": found.step, "bytes": total, "verified": True})
        return
    print(f"checkpoint {found.step} of {run}: {len(list(found.objects()))} objects, {total / 1e6:.1f} MB, all intact")


@checkpoints.command()
def export(
    run: str,
    store: Store,
    out: Annotated[Path, typer.Option(help="Folder for model.safetensors and config.json.")],
    step: Step = None,
    raw: Annotated[bool, typer.Option("--raw", help="The weights themselves instead of their average.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint's weights as one safetensors file that sampling loads without the store."""
    from starflow.checkpoints import export as write
    from starflow.console import print_json
    from starflow.objectstore import open_store

    found = _load(store, run, step)
    write(open_store(store), found, out, ema=not raw)
    if as_json:
        print_json({"run": run, "step": found.step, "out": str(out), "weights": "raw" if raw else "average"})
        return
    print(out)


@checkpoints.command()
def prune(
    run: str,
    store: Store,
    keep_newest: Annotated[int, typer.Option(min=1, help="Newest checkpoints that stay.")] = 3,
    keep_every: Annotated[int | None, typer.Option(min=1, help="Steps divisible by this stay.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say which would be deleted.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete old checkpoints; the best by held-out bits per dimension stays, too."""
    from starflow.checkpoints import list_steps
    from starflow.console import print_json
    from starflow.objectstore import open_store
    from training.retention import prune as delete

    opened = open_store(store)
    before = list_steps(opened, run)
    gone = delete(opened, run, keep_newest, keep_every, dry_run)
    kept = [step for step in before if step not in gone]
    if as_json:
        print_json({"deleted": gone, "kept": kept, "dry_run": dry_run})
        return
    print(f"{'would delete' if dry_run else 'deleted'} {gone or 'nothing'}, keep {kept}")


def _load(store: str, run: str, step: int | None) -> Any:
    from starflow.checkpoints import load_manifest
    from starflow.objectstore import open_store

    return load_manifest(open_store(store), run, "newest" if step is None else step)


def _summary(found: Any) -> dict[str, Any]:
    return {
        "run": found.run,
        "step": found.step,
        "samples": found.progress.samples,
        "created": found.created,
        "ranks": found.ranks,
        "zero_stage": found.zero_stage,
        "parameters": sum(_count(shape) for shape in found.parameters.values()),
        "bytes": sum(ref.size for ref in found.objects()),
        "held_out_bits": found.progress.held_out_bits,
        "snapshot": found.trained.snapshot,
    }


def _count(shape: tuple[int, ...]) -> int:
    import math

    return math.prod(shape)
