"""The snapshot reader against plain numpy: rows, holes, captions, both sides, several parts and grids."""

import hashlib
import os
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from starflow.cache import FileCache
from starflow.encoders import TextIdentity, VAEIdentity
from starflow.errors import ConfigError, CorruptError
from starflow.objectstore import LocalStore, open_store
from starflow.parts import LayerPlan, part_from_arrays
from starflow.reader import SnapshotReader
from starflow.shardindex import held_out_hash
from starflow.snapshots import publish

VAE = VAEIdentity(name="test", sha256="0" * 64, scaling_factor=1.0, channels=2, downsampling=8)
ALT = LayerPlan(origin="alt-text", version="1", weight=1.0)
MODEL = LayerPlan(origin="blip", version="2", weight=3.0)


def name(number):
    return hashlib.sha256(str(number).encode()).hexdigest()


class Data:
    """What went into a part, to compare with."""

    def __init__(self, store, start, count, grid=(2, 3), holes=(), text=False):
        random = np.random.default_rng(start)
        self.mean = random.normal(size=(count, 2, *grid)).astype(np.float16)
        self.std = abs(random.normal(size=(count, 2, *grid))).astype(np.float16)
        self.ids = [None if row in holes else name(start + row) for row in range(count)]
        self.alt = [f"alt {start + row}" for row in range(count)]
        self.model = [None if row % 5 == 0 else f"model {start + row}" for row in range(count)]
        states = random.normal(size=(2, count, 4, 6)).astype(np.float16)
        self.text = list(states) if text else []
        layers = [LayerPlan(**plan.model_dump() | ({"text": TextIdentity(name="t", sha256="1")} if text else {}))
                  for plan in (ALT, MODEL)]  # fmt: skip
        self.part = part_from_arrays(
            store, VAE, self.mean, self.std,
            pa.table({"id": pa.array(self.ids, pa.string()), "url": [f"http://x/{start + r}" for r in range(count)]}),
            list(zip(layers, (self.alt, self.model), strict=True)), self.text, chunk_bytes=96, shard_bytes=384,
        )  # fmt: skip
        self.valid = [row for row in range(count) if row not in holes]


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "store"))


class Remote:
    """A local store that cannot be mapped, as S3 cannot: shards come through the cache."""

    def __init__(self, store):
        self.inner, self.url = store, store.url

    def __getattr__(self, attribute):
        if attribute == "path":
            raise AssertionError("a remote store has no paths")
        return getattr(self.inner, attribute)


@pytest.mark.parametrize("remote", [False, True])
def test_gathers_what_was_written(store, tmp_path, remote):
    a, b = Data(store, 0, 50, holes=(0, 17, 18, 49)), Data(store, 1000, 37)
    wide = Data(store, 2000, 9, grid=(1, 4))
    snapshot = publish(store, parent=None, parts=[a.part, wide.part, b.part], image_size=16)
    reader = SnapshotReader(Remote(store) if remote else store, snapshot, tmp_path / "cache")
    assert reader.counts == {(2, 3): 46 + 37, (1, 4): 9}
    assert reader.grids == ((2, 3), (1, 4))
    assert a.part.count == 46
    mean = np.concatenate([a.mean[a.valid], b.mean])
    std = np.concatenate([a.std[a.valid], b.std])
    ids = [id for id in a.ids + b.ids if id]
    for ordinals in (np.arange(83), np.random.default_rng(1).permutation(83), np.array([82, 0, 82, 46])):
        batch = reader.gather((2, 3), ordinals)
        assert np.array_equal(batch.mean, mean[ordinals])
        assert np.array_equal(batch.std, std[ordinals])
        assert batch.ids == [ids[i] for i in ordinals]
        assert batch.text is None
    assert np.array_equal(reader.gather((1, 4), np.arange(9)).mean, wide.mean)
    assert list(reader.samples((2, 3), np.array([50, 3]))["url"].to_pylist()) == ["http://x/1004", "http://x/4"]


def test_captions_are_drawn_by_weight_and_text_follows(store, tmp_path):
    data = Data(store, 0, 40, holes=(3,), text=True)
    reader = SnapshotReader(store, publish(store, parent=None, parts=[data.part], image_size=16), tmp_path / "cache")
    ordinals = np.arange(39)
    heaviest = reader.gather((2, 3), ordinals)
    expected = [data.model[row] or data.alt[row] for row in data.valid]
    assert heaviest.captions == expected
    draws = np.random.default_rng(0).random((200, 39))
    share = np.mean([[text.startswith("model") for text in reader.gather((2, 3), ordinals, d).captions] for d in draws])
    assert share == pytest.approx(0.75 * np.mean([data.model[row] is not None for row in data.valid]), abs=0.02)
    batch = reader.gather((2, 3), ordinals, draws[0])
    states = [data.text[batch.captions[i].startswith("model")][row] for i, row in enumerate(data.valid)]
    assert np.array_equal(batch.text, np.stack(states))
    assert reader.text.encoder.name == "t"
    assert reader.captions((2, 3), np.array([0, 1])) == [["alt 0"], ["model 1", "alt 1"]]


def test_held_out_samples_stay_held_out(store, tmp_path):
    a, b = Data(store, 0, 300, holes=(5,)), Data(store, 1000, 200)
    first = publish(store, parent=None, parts=[a.part], image_size=16)
    second = publish(store, parent=first, parts=[a.part, b.part], image_size=16)
    ids = [id for id in a.ids + b.ids if id]
    for fraction in (0.02, 0.125):
        wanted = {id for id in ids if held_out_hash(id) < fraction * 2**16}
        reader = SnapshotReader(store, second, tmp_path / "cache", held_out=fraction)
        aside = reader.held_out_side()
        assert set(aside.ids((2, 3), np.arange(aside.count((2, 3))))) == wanted
        assert set(reader.ids((2, 3), np.arange(reader.count((2, 3))))) == set(ids) - wanted
        old = SnapshotReader(store, first, tmp_path / "cache", held_out=fraction).held_out_side()
        assert set(old.ids((2, 3), np.arange(old.count((2, 3))))) == wanted & set(a.ids)
    with pytest.raises(ConfigError, match=r"held_out = 0\.5"):
        SnapshotReader(store, second, tmp_path / "cache", held_out=0.5)


def test_threads_share_a_reader(store, tmp_path):
    data = Data(store, 0, 60)
    snapshot = publish(store, parent=None, parts=[data.part], image_size=16)
    reader, failures = SnapshotReader(Remote(store), snapshot, tmp_path / "cache"), []

    def work(seed):
        for ordinals in np.random.default_rng(seed).integers(0, 60, (20, 8)):
            if not np.array_equal(reader.gather((2, 3), ordinals).mean, data.mean[ordinals]):
                failures.append(ordinals)  # noqa: PERF401

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_missing_and_damaged_shards_are_named(store, tmp_path):
    data = Data(store, 0, 60)
    snapshot = publish(store, parent=None, parts=[data.part], image_size=16)
    assert isinstance(store, LocalStore)
    key = f"parts/{data.part.id}/mean/c/1/0/0/0"
    content = bytearray(store.read(key))
    content[0] ^= 1
    store.write(key, bytes(content))
    with pytest.raises(CorruptError, match=key):
        SnapshotReader(Remote(store), snapshot, tmp_path / "cache").gather((2, 3), np.arange(60))
    store.delete([key])
    with pytest.raises(CorruptError, match=key):
        SnapshotReader(store, snapshot, tmp_path / "cache").gather((2, 3), np.arange(60))
    reader = SnapshotReader(store, snapshot, tmp_path / "cache")
    with pytest.raises(IndexError, match="60"):
        reader.gather((2, 3), np.array([60]))


@pytest.mark.parametrize("left", ["zeros", "half", "nothing"])
def test_what_a_loss_of_power_left_in_the_cache_is_fetched_again(store, tmp_path, left):
    data = Data(store, 0, 60)
    snapshot = publish(store, parent=None, parts=[data.part], image_size=16)
    SnapshotReader(Remote(store), snapshot, tmp_path / "cache").gather((2, 3), np.arange(60))
    files = [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]
    assert {path.name.partition("-")[0] for path in files} > {"captions"}
    for path in files:
        size = path.stat().st_size
        path.write_bytes({"zeros": bytes(size), "half": path.read_bytes()[: size // 2], "nothing": b""}[left])
    batch = SnapshotReader(Remote(store), snapshot, tmp_path / "cache").gather((2, 3), np.arange(60))
    assert np.array_equal(batch.mean, data.mean)
    assert batch.captions[1] == "model 1"


def test_maps_hold_no_more_of_the_disk_than_the_cache_may_take(store, tmp_path):
    data = Data(store, 0, 60)
    snapshot = publish(store, parent=None, parts=[data.part], image_size=16)
    cache = FileCache(tmp_path / "cache")
    reader = SnapshotReader(Remote(store), snapshot, cache)
    reader.gather((2, 3), np.arange(60))
    sizes = {path.name: path.stat().st_size for path in cache.directory.iterdir()}
    cache.limit = sum(sizes.values()) - sum(sizes[Path(name).name] for name in mapped(cache)) // 2
    assert len(mapped(cache)) == 8
    cache.open("another", lambda path: path.write_bytes(b"x")).close()
    assert 0 < len(mapped(cache)) < 8
    assert all(Path(name).exists() for name in mapped(cache))
    assert np.array_equal(reader.gather((2, 3), np.arange(60)).mean, data.mean)


def test_tables_that_are_evicted_hold_nothing_of_the_disk(store, tmp_path):
    data = Data(store, 0, 60)
    snapshot = publish(store, parent=None, parts=[data.part], image_size=16)
    cache = FileCache(tmp_path / "cache")
    readers = [SnapshotReader(each, snapshot, cache) for each in (Remote(store), store)]
    for reader in readers:
        assert reader.gather((2, 3), np.arange(60)).ids == data.ids
    cache.make_room(2**40)
    assert str(cache.directory) not in Path("/proc/self/maps").read_text()
    for reader in readers:
        assert reader.gather((2, 3), np.arange(60)).captions[1] == "model 1"


@pytest.mark.parametrize("remote", [False, True])
def test_a_reader_that_needs_nothing_new_closes_what_another_process_has_evicted(store, tmp_path, monkeypatch, remote):
    monkeypatch.setattr("starflow.cache.LOOK_SECONDS", 0.0)
    data = Data(store, 0, 60)
    snapshot = publish(store, parent=None, parts=[data.part], image_size=16)
    cache = FileCache(tmp_path / "cache")
    reader = SnapshotReader(Remote(store) if remote else store, snapshot, cache)
    reader.gather((2, 3), np.arange(60))
    FileCache(cache.directory).make_room(2**40)
    assert np.array_equal(reader.gather((2, 3), np.arange(60)).mean, data.mean)
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(cache.directory) in line]
    assert maps
    assert not [line for line in maps if line.endswith("(deleted)")]


def test_tables_in_use_are_not_evicted_before_shards_that_are_not(store, tmp_path, monkeypatch):
    """They stay mapped, so that nobody opens their files again."""
    monkeypatch.setattr("starflow.cache.LOOK_SECONDS", 0.0)
    data = Data(store, 0, 60)
    snapshot = publish(store, parent=None, parts=[data.part], image_size=16)
    cache = FileCache(tmp_path / "cache")
    reader = SnapshotReader(Remote(store), snapshot, cache)
    reader.gather((2, 3), np.arange(60))
    tables = {path for path in cache.directory.iterdir() if "-" in path.name}
    for path in cache.directory.iterdir():
        os.utime(path, (time.time() - (60 if path in tables else 30),) * 2)
    for _ in range(2):  # seen as used by the next look
        reader.gather((2, 3), np.arange(60))
    cache.make_room(1)
    assert len(tables) == 2
    assert all(path.exists() for path in tables)


def mapped(cache):
    """Shards that this process maps, evicted ones included."""
    found = {line.split(maxsplit=5)[5] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    return {name for name in found if name.startswith(str(cache.directory)) and "captions-" not in name}


def test_empty_batch(store, tmp_path):
    data = Data(store, 0, 5)
    reader = SnapshotReader(store, publish(store, parent=None, parts=[data.part], image_size=16), tmp_path / "cache")
    batch = reader.gather((2, 3), np.empty(0, np.int64))
    assert batch.mean.shape == (0, 2, 2, 3)
    assert batch.ids == batch.captions == []


def test_from_s3_through_the_cache(s3_url, tmp_path):
    store = open_store(s3_url)
    data = Data(store, 0, 60, holes=(7,), text=True)
    snapshot = publish(store, parent=None, parts=[data.part], image_size=16)
    reader = SnapshotReader(store, snapshot, tmp_path / "cache", held_out=0.125)
    both = [(side, np.arange(side.count((2, 3)))) for side in (reader, reader.held_out_side())]
    batches = [side.gather((2, 3), ordinals) for side, ordinals in both]
    rows = {data.ids[row]: row for row in data.valid}
    assert sorted(id for batch in batches for id in batch.ids) == sorted(rows)
    for batch in batches:
        assert np.array_equal(batch.mean, data.mean[[rows[id] for id in batch.ids]])
