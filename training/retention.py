"""Which checkpoints stay, and the removal of the others and of what no checkpoint names."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from starflow.checkpoints import checkpoint_key, list_steps, load_manifest
from starflow.errors import NotFoundError
from starflow.objectstore import ObjectStore


def kept(held_out: Mapping[int, float | None], keep_newest: int, keep_every: int | None) -> set[int]:
    """Steps that stay: the newest ones, every so manieth, and the best by held-out bits per dimension.

    A checkpoint between two validations carries the value of the earlier one: the first with it is the best.
    """
    steps = sorted(held_out)
    keep = set(steps[-keep_newest:])
    if keep_every is not None:
        keep |= {step for step in steps if step % keep_every == 0}
    measured = {step: value for step, value in held_out.items() if value is not None}
    if measured:
        keep.add(min(measured, key=lambda step: (measured[step], step)))
    return keep


def prune(store: ObjectStore, run: str, keep_newest: int, keep_every: int | None, dry_run: bool = False) -> list[int]:
    """Deletes checkpoints that need not stay, manifests first, and objects of saves that never committed.

    Objects newer than the newest checkpoint stay: they may belong to a save in flight. Returns the steps deleted, or
    with `dry_run` those that would be.
    """
    manifests = {}
    for step in list_steps(store, run):
        with suppress(NotFoundError):  # the run itself has pruned it meanwhile
            manifests[step] = load_manifest(store, run, step)
    keep = kept({step: m.progress.held_out_bits for step, m in manifests.items()}, keep_newest, keep_every)
    gone = [step for step in manifests if step not in keep]
    if dry_run:
        return gone
    store.delete(checkpoint_key(run, step) for step in gone)
    named = {ref.key for step in keep for ref in manifests[step].objects()}
    newest = max(manifests, default=-1)
    prefix = f"runs/{run}/shards/"
    store.delete(
        [
            info.key
            for info in store.list(prefix)
            if info.key not in named and int(info.key.removeprefix(prefix)[:9]) <= newest
        ]
    )
    return gone
