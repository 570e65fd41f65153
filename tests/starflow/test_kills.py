"""Upkeep killed at any of its changes: no snapshot misses anything, and the same command again ends as undisturbed."""

from __future__ import annotations

from pathlib import Path

import pytest

from starflow.compaction import compact
from starflow.objectstore import LocalStore
from starflow.parts import LayerPlan, add_layer
from starflow.removal import take_down
from starflow.snapshots import Part, publish
from starflow.takedowns import Takedowns
from starflow.upkeep import collect_garbage
from tests.mortal_store import die_everywhere
from tests.starflow.test_upkeep import make_part, name, stored_bytes

SEVENTEEN = Takedowns([("url", "http://host1.example/secret-17")])


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def parts(store: LocalStore, *starts: int) -> list[Part]:
    return [make_part(store, start, 20)[0] for start in starts]


def gone(store: LocalStore, count: int = 20) -> bool:
    """Whether no byte is left of sample 17 of the part that begins with 0 and has `count` samples."""
    _, mean, text = make_part(LocalStore(store.root.parent / "other"), 0, count)
    found = stored_bytes(store)
    return not any(trace in found for trace in (mean[17].tobytes(), text[17].tobytes(), f"'{name(17)}'".encode()))


def test_garbage_collection_after_a_takedown(store: LocalStore, tmp_path: Path) -> None:
    a, b = parts(store, 0, 1000)
    first = publish(store, parent=None, parts=[a], image_size=16)
    publish(store, parent=first, parts=[a, b], image_size=16)
    take_down(store, SEVENTEEN)
    assert die_everywhere(tmp_path, store, collect_garbage) > 15
    assert gone(LocalStore(tmp_path / "calm"))


def test_garbage_collection_of_the_takedown_itself(store: LocalStore, tmp_path: Path) -> None:
    """The snapshot that withdrew the part goes, too: who is killed then must not forget what was withdrawn."""
    a, b, c = parts(store, 0, 1000, 2000)
    first = publish(store, parent=None, parts=[a, c], image_size=16)
    publish(store, parent=first, parts=[a, b], image_size=16)
    removal = take_down(store, SEVENTEEN).snapshot
    publish(store, parent=removal, parts=[*removal.parts, *parts(store, 3000)], image_size=16)
    assert die_everywhere(tmp_path, store, lambda each: collect_garbage(each, keep=1)) > 15
    assert gone(LocalStore(tmp_path / "calm"))


def test_garbage_collection_of_caption_layers(store: LocalStore, tmp_path: Path) -> None:
    (part,) = parts(store, 0)
    first = publish(store, parent=None, parts=[part], image_size=16)
    for version in ("1", "2"):
        plan = LayerPlan(origin="eye", version=version)
        layers = (*part.captions, add_layer(store, part, plan, ["seen"] * part.rows))
        newer = part.model_copy(update={"captions": layers})
        first = publish(store, parent=first, parts=[newer], image_size=16)
    assert die_everywhere(tmp_path, store, lambda each: collect_garbage(each, keep=1, grace_hours=0)) > 5


def test_compaction(store: LocalStore, tmp_path: Path) -> None:
    publish(store, parent=None, parts=parts(store, 0, 1000, 2000), image_size=16)
    assert die_everywhere(tmp_path, store, compact) > 10


def test_takedown(store: LocalStore, tmp_path: Path) -> None:
    publish(store, parent=None, parts=parts(store, 0, 1000), image_size=16)
    assert die_everywhere(tmp_path, store, lambda each: take_down(each, SEVENTEEN)) > 10


@pytest.mark.slow
def test_takedown_compaction_and_garbage_collection(store: LocalStore, tmp_path: Path) -> None:
    publish(store, parent=None, parts=parts(store, 0, 1000), image_size=16)

    def night(each: LocalStore) -> None:
        take_down(each, SEVENTEEN)
        compact(each)
        collect_garbage(each)

    assert die_everywhere(tmp_path, store, night) > 30
    assert gone(LocalStore(tmp_path / "calm"))
