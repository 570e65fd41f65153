"""Commands over published snapshots: snapshots list | show | diff | verify | compact | gc, preview, takedown."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

snapshots = typer.Typer(help="List, show, compare and check published snapshots.", no_args_is_help=True)

#: Rules of a takedown that are printed for people.
RULES = 20

StoreOption = Annotated[str, typer.Option("--store", help="Where snapshots live: a folder or s3://BUCKET/PREFIX.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Name = Annotated[str, typer.Argument(help="Snapshot id, number, or newest.")]


@snapshots.command("list")
def list_(store: StoreOption, json: JsonOption = False) -> None:
    """List the snapshots of a store, oldest first."""
    from starflow.console import print_json
    from starflow.objectstore import open_store
    from starflow.snapshots import list_snapshots

    summaries = list_snapshots(open_store(store))
    if json:
        print_json([summary.model_dump(mode="json") for summary in summaries])
        return
    if not summaries:
        print(f"{store} holds no snapshot yet; publish one with starflow refresh")
        return
    rows = [
        (s.id, s.created, f"{s.counts.added:,}", f"{s.counts.total:,}", f"{sum(s.dropped.values()):,}", s.vae.name)
        for s in summaries
    ]
    _print_table(("snapshot", "created", "added", "total", "dropped", "VAE"), rows)


@snapshots.command()
def show(name: Name = "newest", *, store: StoreOption, json: JsonOption = False) -> None:
    """Show one snapshot: counts, drops by reason, shapes, what made it."""
    from pipelines.report import facts
    from starflow.console import print_json
    from starflow.objectstore import open_store
    from starflow.snapshots import load_snapshot

    snapshot = load_snapshot(open_store(store), name)
    if json:
        print_json(snapshot.model_dump(mode="json"))
        return
    _print_table(("snapshot", snapshot.id), facts(snapshot))


@snapshots.command()
def diff(
    old: Annotated[str, typer.Argument(help="Snapshot id or number.")],
    new: Name = "newest",
    *,
    store: StoreOption,
    json: JsonOption = False,
) -> None:
    """Compare two snapshots, sample by sample."""
    from pipelines.report import compared
    from starflow.console import print_json
    from starflow.objectstore import open_store
    from starflow.snapshots import load_snapshot
    from starflow.upkeep import difference

    opened = open_store(store)
    found = difference(opened, load_snapshot(opened, old), load_snapshot(opened, new))
    if json:
        print_json(found.model_dump(mode="json"))
        return
    _print_table(("", found.old, found.new), compared(found))


@snapshots.command()
def verify(
    name: Name = "newest",
    *,
    store: StoreOption,
    read: Annotated[bool, typer.Option(help="Read every byte and compare checksums.")] = False,
    json: JsonOption = False,
) -> None:
    """Check that all objects of a snapshot are there, with the right sizes; with --read also their content."""
    from pipelines.report import damaged
    from starflow.console import console, print_json
    from starflow.objectstore import open_store
    from starflow.snapshots import load_snapshot
    from starflow.upkeep import verify as find_problems

    opened = open_store(store)
    snapshot = load_snapshot(opened, name)
    with console.status(f"checking {len(snapshot.parts)} parts"):
        problems = find_problems(opened, snapshot, read)
    if json:
        print_json({"snapshot": snapshot.id, "problems": problems})
    for problem in problems:
        console.print(problem, highlight=False, markup=False)
    if problems:
        raise damaged(snapshot, problems)
    if not json:
        print(f"{snapshot.id}: all {len(snapshot.parts)} parts are there" + (" and intact" if read else ""))


@snapshots.command()
def compact(store: StoreOption, json: JsonOption = False) -> None:
    """Publish a snapshot whose many small parts are few large ones; every sample stays as it is."""
    from starflow.compaction import compact as run
    from starflow.console import console, print_json
    from starflow.objectstore import open_store

    with console.status("merging small parts"):
        done = run(open_store(store))
    answer = {"snapshot": done.snapshot.id, "parent": done.snapshot.parent, "parts": [done.before, done.after]}
    if json:
        print_json(answer)
    else:
        print(f"snapshot {done.snapshot.id}: {done.before:,} parts are now {done.after:,}")


@snapshots.command()
def gc(
    store: StoreOption,
    keep: Annotated[int | None, typer.Option(min=1, help="Keep only the newest so many snapshots.")] = None,
    grace_hours: Annotated[
        float,
        typer.Option(min=0, help="Leave unreferenced objects for so long: a refresh or recaption may be writing them."),
    ] = 168.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
    json: JsonOption = False,
) -> None:
    """Delete withdrawn and unreferenced data: after a takedown, the last bytes of what was taken down.

    A training run whose snapshot is deleted stops with an error, and cannot go on.
    """
    from pipelines.garbage import collect
    from starflow.console import print_json
    from starflow.objectstore import open_store

    garbage, scrubbed = collect(open_store(store), keep, grace_hours, dry_run)
    if json:
        print_json(garbage.model_dump(mode="json") | {"scrubbed": scrubbed})
        return
    verb = "would delete" if dry_run else "deleted"
    for snapshot in garbage.snapshots:
        why = "holds samples that were taken down" if snapshot in garbage.withdrawn else f"not of the newest {keep}"
        print(f"{verb} snapshot {snapshot}: {why}")
    print(f"{verb} {len(garbage.snapshots)} snapshots and {garbage.objects:,} objects ({garbage.bytes / 1e6:,.1f} MB)")
    if scrubbed:
        print(f"erased {scrubbed:,} downloaded pictures that were taken down")
    if garbage.unfinished:
        print(f"{verb} what {garbage.unfinished:,} writes that died half-way have left")
    if garbage.waiting:
        print(
            f"{len(garbage.waiting)} unreferenced groups stay, as somebody may be writing them; "
            f"a run after {garbage.due} deletes the last of them"
        )


def preview(
    name: Name = "newest",
    *,
    store: StoreOption,
    out: Annotated[Path, typer.Option(help="Folder for the page and the pictures.")] = Path("preview"),
    count: Annotated[int, typer.Option(min=1, help="Samples to decode.")] = 32,
    seed: Annotated[int, typer.Option(help="Which samples.")] = 0,
    vae: Annotated[str | None, typer.Option(help="Where to find the snapshot's VAE, if not under its name.")] = None,
    json: JsonOption = False,
) -> None:
    """Decode a few samples of a snapshot back to pictures, with captions, as PNG and HTML."""
    from pipelines.preview import decode_samples, write_preview
    from starflow.console import print_json
    from starflow.objectstore import open_store
    from starflow.snapshots import load_snapshot

    opened = open_store(store)
    snapshot = load_snapshot(opened, name)
    with tempfile.TemporaryDirectory(prefix="starflow-preview-") as cache:
        previews = decode_samples(opened, snapshot, Path(cache), count, seed, vae)
    page = write_preview(snapshot, previews, out)
    if json:
        decoded = sum(len(found.pixels) for found in previews)
        print_json({"snapshot": snapshot.id, "page": str(page), "samples": decoded})
    else:
        print(page)


def takedown(
    store: StoreOption,
    url: Annotated[list[str] | None, typer.Option(help="URL, in any spelling; may be repeated.")] = None,
    host: Annotated[list[str] | None, typer.Option(help="Host, with its subdomains; may be repeated.")] = None,
    id: Annotated[list[str] | None, typer.Option(help="Sample id: SHA-256 of the file; may be repeated.")] = None,
    file: Annotated[str | None, typer.Option(help="Text file, local or on s3://: a URL, host or id a line.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count what would be taken down.")] = False,
    json: JsonOption = False,
) -> None:
    """Publish a snapshot without some samples, which never come back. Run `snapshots gc` to delete their bytes."""
    from pipelines.takedown import TakedownConfig
    from pipelines.takedown import takedown as run
    from starflow.console import console, print_json

    named = {"urls": tuple(url or ()), "hosts": tuple(host or ()), "ids": tuple(id or ())}
    done = run(TakedownConfig(store=store, **named, file=file, dry_run=dry_run))
    if json:
        print_json(done.model_dump())
        return
    for rule, count in list(done.rules.items())[:RULES]:
        console.print(f"{count:>9,}  {rule}", highlight=False, markup=False)
    if len(done.rules) > RULES:
        console.print(f"and {len(done.rules) - RULES:,} more rules; --json has all")
    if dry_run:
        print(f"snapshot {done.snapshot}: {done.removed:,} of {done.total:,} samples would be removed")
        return
    print(f"snapshot {done.snapshot}: {done.removed:,} samples removed, {done.total:,} left")
    if not done.removed:
        print("the newest snapshot held none of them; they are recorded, and stay out of later ones")
    if done.withdrawn:
        print(f"their bytes go with: starflow snapshots gc --store {store}")


def _print_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(header):
        table.add_column(name, no_wrap=number == 0, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(markup=False)
    if not console.is_terminal:
        console.width = 200  # for files and pipes; a terminal knows its own width
    console.print(table)
