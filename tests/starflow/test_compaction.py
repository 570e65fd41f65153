"""Compaction: many small parts become one, every sample, caption and text state bit for bit the same."""

import numpy as np
import pytest

from starflow import compaction
from starflow.compaction import compact
from starflow.errors import NotFoundError
from starflow.objectstore import open_store
from starflow.reader import SnapshotReader
from starflow.removal import take_down
from starflow.snapshots import publish
from starflow.takedowns import Takedowns
from starflow.upkeep import collect_garbage, difference, verify
from tests.starflow.test_reader import Data

GRID = (2, 3)
SIZES = {"shard_bytes": 2**12, "chunk_bytes": 2**10}  # 85 rows of 48 bytes of text states


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "store"))


def content(store, snapshot, cache, grid=GRID):
    """All that a reader sees of the samples, by id."""
    reader = SnapshotReader(store, snapshot, cache)
    ordinals = np.arange(reader.count(grid))
    found = {}
    for draw in (0.0, 0.999):
        batch = reader.gather(grid, ordinals, np.full(len(ordinals), draw))
        captions, samples = reader.captions(grid, ordinals), reader.samples(grid, ordinals).drop_columns(["row"])
        for row, id in enumerate(batch.ids):
            text = batch.text[row].tobytes() if batch.text is not None else None
            found[id, draw] = (batch.mean[row].tobytes(), batch.std[row].tobytes(), batch.captions[row], text,
                               captions[row], samples.slice(row, 1).to_pylist())  # fmt: skip
    return found


@pytest.mark.parametrize("text", [False, True])
def test_small_parts_become_few_and_samples_stay_the_same(store, tmp_path, text):
    nights = [Data(store, 100 * night, 30, holes=(night,), text=text).part for night in range(6)]
    wide = Data(store, 5000, 9, grid=(1, 4), text=text).part
    old = publish(store, parent=None, parts=[*nights[:3], wide, *nights[3:]], image_size=16, attribution="by us")
    before = [content(store, old, tmp_path / "cache", grid) for grid in (GRID, (1, 4))]
    done = compact(store, **SIZES)
    assert (done.before, done.after) == (7, 2)
    assert [part.id == wide.id for part in done.snapshot.parts] == [False, True]
    assert done.snapshot.counts.model_dump() == {"added": 0, "kept": 6 * 29 + 9, "total": 6 * 29 + 9}
    assert done.snapshot.attribution == "by us"
    assert [content(store, done.snapshot, tmp_path / "cache", grid) for grid in (GRID, (1, 4))] == before
    assert verify(store, done.snapshot, read=True) == []
    assert (difference(store, old, done.snapshot).added, difference(store, old, done.snapshot).removed) == (0, 0)
    again = compact(store, **SIZES)
    assert (again.snapshot.id, again.before, again.after) == (done.snapshot.id, 2, 2)


def test_parts_of_other_layers_and_large_ones_stay(store):
    small = [Data(store, 100 * night, 10).part for night in range(4)]
    heavy = [layer.model_copy(update={"weight": 9.0}) for layer in small[3].captions]
    small[3] = small[3].model_copy(update={"captions": tuple(heavy)})
    large = Data(store, 5000, 200).part
    publish(store, parent=None, parts=[small[0], large, *small[1:]], image_size=16)
    parts = compact(store, **SIZES).snapshot.parts
    assert [part.rows for part in parts] == [30, 200, 10]
    assert parts[1:] == (large, small[3])


def test_it_goes_on_top_of_what_others_publish(store, monkeypatch):
    parts = [Data(store, 100 * night, 10).part for night in range(3)]
    first = publish(store, parent=None, parts=parts[:2], image_size=16)
    real = compaction.publish

    def race(*arguments, **settings):
        monkeypatch.setattr(compaction, "publish", real)
        publish(store, parent=first, parts=parts, image_size=16)
        return real(*arguments, **settings)

    monkeypatch.setattr(compaction, "publish", race)
    done = compact(store, **SIZES)
    assert (done.snapshot.number, done.after, done.snapshot.counts.total) == (3, 1, 30)


def test_what_was_compacted_can_be_taken_down_and_collected(store, tmp_path):
    parts = [Data(store, 100 * night, 10, text=True).part for night in range(3)]
    publish(store, parent=None, parts=parts, image_size=16)
    compact(store, **SIZES)
    removal = take_down(store, Takedowns([("url", "http://x/104")]))
    collect_garbage(store, keep=1, grace_hours=0)
    assert {key.key.split("/")[1] for key in store.list("parts/")} == {part.id for part in removal.snapshot.parts}
    assert verify(store, removal.snapshot, read=True) == []
    assert len(content(store, removal.snapshot, tmp_path / "cache")) == 2 * 29


def test_nothing_to_compact_is_said(store):
    with pytest.raises(NotFoundError, match="nothing to compact"):
        compact(store)
