"""Snapshots: content ids, one line of history, racing publishers, refusals."""

import hashlib
import threading

import numpy as np
import pyarrow as pa
import pytest

from starflow.encoders import VAEIdentity
from starflow.errors import AlreadyExistsError, NotFoundError, StoreError
from starflow.objectstore import open_store
from starflow.parts import part_from_arrays
from starflow.snapshots import (
    CaptionLayer,
    list_snapshots,
    load_snapshot,
    newest_snapshot,
    publish,
)

VAE = VAEIdentity(name="test", sha256="0" * 64, scaling_factor=1.0, channels=4, downsampling=8)


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "store"))


def make_part(store, name, count=3, vae=VAE):
    latents = np.zeros((count, 4, 2, 2), np.float16)
    samples = pa.table({"id": [hashlib.sha256(f"{name} {n}".encode()).hexdigest() for n in range(count)],
                        "url": [f"http://example.org/{name}/{n}" for n in range(count)]})  # fmt: skip
    return part_from_arrays(store, vae, latents, latents, samples)


def test_first_snapshot_reads_back(store):
    published = publish(
        store, parent=None, parts=[make_part(store, "a")], image_size=32, dropped={"404": 2}, attribution="by X"
    )
    assert load_snapshot(store, published.id) == load_snapshot(store) == load_snapshot(store, "1") == published
    assert published.counts.model_dump() == {"added": 3, "kept": 0, "total": 3}
    assert published.parent is None
    assert published.id.startswith("00000001-")


def test_child_counts_what_it_added(store):
    first = publish(store, parent=None, parts=[make_part(store, "a")], image_size=32)
    second = publish(store, parent=first, parts=[*first.parts, make_part(store, "b", 5)], image_size=32)
    assert second.counts.model_dump() == {"added": 5, "kept": 3, "total": 8}
    assert second.parent == first.id
    assert [summary.id for summary in list_snapshots(store)] == [first.id, second.id]
    assert newest_snapshot(store) == second


def test_same_content_has_the_same_id_and_is_published_once(store, tmp_path):
    part = make_part(store, "a")
    first = publish(store, parent=None, parts=[part], image_size=32)
    assert publish(store, parent=None, parts=[part], image_size=32) == first
    assert publish(store, parent=first, parts=first.parts, image_size=32) == first
    other = open_store(str(tmp_path / "other"))
    assert publish(other, parent=None, parts=[make_part(other, "a")], image_size=32).id == first.id
    assert len(list_snapshots(store)) == 1


def test_of_racing_publishers_one_wins_and_the_others_are_told(store):
    first = publish(store, parent=None, parts=[make_part(store, "root")], image_size=32)
    parts = [make_part(store, f"racer{i}") for i in range(4)]
    outcomes, barrier = [], threading.Barrier(4)

    def race(part):
        barrier.wait()
        try:
            outcomes.append(publish(store, parent=first, parts=[*first.parts, part], image_size=32).id)
        except AlreadyExistsError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=race, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    newest = load_snapshot(store)
    assert newest.number == 2
    assert outcomes.count(newest.id) == 1
    assert all("run the same command again" in text for text in outcomes if text != newest.id)


def test_what_no_reader_could_load_is_not_published(store):
    part = make_part(store, "a")
    layer = CaptionLayer(origin="alt-text", version="1", weight=1.0, captions=part.samples)
    wrong = part.model_copy(update={"captions": (layer.model_copy(update={"weight": -2.0}),)})
    with pytest.raises(StoreError, match="nothing is published"):
        publish(store, parent=None, parts=[wrong], image_size=32)
    assert newest_snapshot(store) is None


@pytest.mark.parametrize("gone", ["samples.parquet", "index.parquet", "mean/c/0/0/0/0"])
def test_what_has_been_collected_as_garbage_is_not_published(store, gone):
    first = publish(store, parent=None, parts=[make_part(store, "a")], image_size=32)
    part = make_part(store, "b")
    store.delete([f"parts/{part.id}/{gone}"])
    with pytest.raises(StoreError, match=rf"parts/{part.id}/{gone}.*same command again"):
        publish(store, parent=first, parts=[*first.parts, part], image_size=32)
    assert newest_snapshot(store) == first


def test_refusals_name_the_thing(store):
    with pytest.raises(NotFoundError, match="no snapshot yet"):
        load_snapshot(store)
    assert newest_snapshot(store) is None
    with pytest.raises(StoreError, match="without any sample"):
        publish(store, parent=None, parts=[], image_size=32)
    first = publish(store, parent=None, parts=[make_part(store, "a")], image_size=32)
    other = VAE.model_copy(update={"name": "other", "sha256": "1" * 64})
    with pytest.raises(StoreError, match="VAE other"):
        publish(store, parent=first, parts=[*first.parts, make_part(store, "b", vae=other)], image_size=32)
    with pytest.raises(StoreError, match=r"16 px latents.*image_size=32"):
        publish(store, parent=first, parts=[*first.parts, make_part(store, "c")], image_size=16)
    for name in ("7", "00000001-ffffffffffffffff", "nonsense"):
        with pytest.raises(NotFoundError, match="number 1"):
            load_snapshot(store, name)
