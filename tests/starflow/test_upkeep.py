"""Takedown, garbage collection, verification and differences of snapshots, proven on the stored bytes."""

import hashlib
import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr

from starflow import upkeep
from starflow.compaction import compact
from starflow.encoders import TextIdentity, VAEIdentity
from starflow.errors import ConfigError, NotFoundError
from starflow.objectstore import open_store
from starflow.parts import LayerPlan, add_layer, layer_folder, part_from_arrays, write_states
from starflow.reader import SnapshotReader
from starflow.removal import take_down
from starflow.snapshots import load_snapshot, publish
from starflow.takedowns import Takedowns, parse_entry
from starflow.upkeep import collect_garbage, difference, verify

VAE = VAEIdentity(name="test", sha256="0" * 64, scaling_factor=1.0, channels=2, downsampling=8)
GRID = (2, 3)


def name(number):
    return hashlib.sha256(str(number).encode()).hexdigest()


def make_part(store, start, count=40):
    random = np.random.default_rng(start)
    mean, std = random.normal(size=(2, count, 2, *GRID)).astype(np.float16)
    numbers = range(start, start + count)
    samples = pa.table(
        {"id": [name(n) for n in numbers], "url": [f"http://host{n % 4}.example/secret-{n}" for n in numbers]}
    )
    layer = LayerPlan(origin="alt-text", version="1", text=TextIdentity(name="t", sha256="1"))
    text = random.normal(size=(count, 2, 3)).astype(np.float16)
    captions = [f"secret caption {n}" for n in numbers]
    return part_from_arrays(store, VAE, mean, std, samples, [(layer, captions)], [text], shard_bytes=2**18), mean, text


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "store"))


def stored_bytes(store):
    """Everything under the store, decompressed where it is Parquet; not the record of what must not come back."""
    found = []
    for path in sorted(Path(store.url).rglob("*")):
        if path.is_file() and "takedowns" not in path.parts:
            found.append(path.read_bytes())
            if path.suffix == ".parquet":
                found.append(str(pq.read_table(path).to_pylist()).encode())
    return b"\n".join(found)


def test_after_takedown_and_gc_no_bytes_are_left(store, tmp_path):
    (a, mean, text), (b, _, _) = make_part(store, 0), make_part(store, 1000)
    first = publish(store, parent=None, parts=[a], image_size=16)
    second = publish(store, parent=first, parts=[a, b], image_size=16)
    victim = 17
    traces = [mean[victim].tobytes(), text[victim].tobytes(), b"secret caption 17'", name(victim).encode()]
    assert all(trace in stored_bytes(store) for trace in traces)

    removal = take_down(store, Takedowns([("url", f"http://host1.example/secret-{victim}")]))
    assert removal.removed == 1
    assert removal.snapshot.counts.model_dump() == {"added": 0, "kept": 79, "total": 79}
    assert removal.snapshot.parent == second.id
    garbage = collect_garbage(store)
    assert set(garbage.snapshots) == {first.id, second.id}
    assert not any(trace in stored_bytes(store) for trace in traces)
    assert verify(store, removal.snapshot, read=True) == []

    reader = SnapshotReader(store, removal.snapshot, tmp_path / "cache")
    batch = reader.gather(GRID, np.arange(79))
    kept = [n for n in [*range(40), *range(1000, 1040)] if n != victim]
    assert batch.ids == [name(n) for n in kept]
    assert batch.captions == [f"secret caption {n}" for n in kept]
    place = batch.ids.index(name(18))
    assert np.array_equal(batch.mean[place], mean[18])
    assert np.array_equal(batch.text[place], text[18])
    part = next(part for part in removal.snapshot.parts if part.id not in (a.id, b.id))
    assert not zarr.open_group(f"{store.url}/parts/{part.id}", mode="r")["mean"][victim].any()
    assert part.count == 39


@pytest.mark.parametrize(
    ("entries", "gone"),
    [
        ([("url", "http://host1.example/secret-17")], [17]),
        ([("host", "host1.example")], range(1, 40, 4)),
        ([("id", name(6))], [6]),
        ([parse_entry(line) for line in (name(3).upper(), "http://host1.example/secret-17", "host2.example")],
         [3, 17, *range(2, 40, 4)]),
    ],
    ids=["url", "host", "id", "list"],
)  # fmt: skip
def test_no_kind_of_takedown_leaves_bytes(store, entries, gone):
    part, mean, text = make_part(store, 0)
    publish(store, parent=None, parts=[part], image_size=16)
    traces = [trace for n in gone for trace in (mean[n].tobytes(), text[n].tobytes(), f"'{name(n)}'".encode())]
    before = stored_bytes(store)
    assert all(trace in before for trace in traces)
    assert take_down(store, Takedowns(entries)).removed == len(gone)
    collect_garbage(store)
    after = stored_bytes(store)
    assert not any(trace in after for trace in traces)


def test_takedown_reaches_parts_that_only_older_snapshots_hold(store):
    (a, mean, text), (b, _, _) = make_part(store, 0), make_part(store, 1000)
    publish(store, parent=None, parts=[a], image_size=16)
    merged = compact(store).snapshot
    second = publish(store, parent=merged, parts=[*merged.parts, b], image_size=16)
    merged = compact(store).snapshot
    assert merged.parent == second.id
    assert len(merged.parts) == 1
    traces = [mean[17].tobytes(), text[17].tobytes(), f"'{name(17)}'".encode()]
    removal = take_down(store, Takedowns([("url", "http://host1.example/secret-17")]))
    assert set(removal.snapshot.withdrawn) == {a.id, merged.parts[0].id}
    again = take_down(store, Takedowns([("url", "http://host1.example/secret-17")]))
    assert again.snapshot.id == removal.snapshot.id
    collect_garbage(store)
    assert not any(trace in stored_bytes(store) for trace in traces)


def test_takedown_of_what_has_left_the_newest_snapshot_reaches_older_ones(store):
    (a, mean, text), (b, _, _) = make_part(store, 0), make_part(store, 1000)
    first = publish(store, parent=None, parts=[a, b], image_size=16)
    publish(store, parent=first, parts=[b], image_size=16, added=0, removed={"gone": 40})
    removal = take_down(store, Takedowns([("id", name(17))]))
    assert (removal.removed, removal.snapshot.withdrawn) == (0, (a.id,))
    collect_garbage(store)
    traces = [mean[17].tobytes(), text[17].tobytes(), f"'{name(17)}'".encode()]
    assert not any(trace in stored_bytes(store) for trace in traces)


def test_takedown_by_host_id_and_of_everything(store):
    first = publish(store, parent=None, parts=[make_part(store, 0)[0]], image_size=16)
    by_host = take_down(store, Takedowns([("host", "host2.example"), ("id", name(1))]))
    assert by_host.removed == 11
    nothing = take_down(store, Takedowns([("host", "elsewhere.example")]))
    assert nothing.removed == 0
    assert nothing.snapshot.parts == by_host.snapshot.parts
    recorded = Takedowns.load(store, nothing.snapshot.takedowns)
    ids = {("id", name(n)) for n in [1, *range(2, 40, 4)]}
    assert recorded.entries == {("host", "host2.example"), ("host", "elsewhere.example")} | ids
    assert recorded.blocks([None, None], ["http://sub.HOST2.example:80/x", "http://nothost2.example/"]).tolist() == [
        True,
        False,
    ]
    empty = take_down(store, Takedowns([("host", "example")]))
    assert empty.snapshot.counts.total == 0
    assert difference(store, first, empty.snapshot).removed == 40


def test_takedowns_that_mean_nothing_are_refused(store):
    with pytest.raises(NotFoundError, match="no snapshot"):
        take_down(store, Takedowns([("id", "x")]))
    with pytest.raises(ConfigError, match="colour"):
        Takedowns([("colour", "red")])


def test_takedown_goes_on_from_whoever_published_meanwhile(store, monkeypatch):
    a, b = make_part(store, 0)[0], make_part(store, 1000)[0]
    first = publish(store, parent=None, parts=[a], image_size=16)
    save, calls = Takedowns.save, []

    def save_after_a_rival(self, where):
        if not calls:
            calls.append(publish(store, parent=first, parts=[a, b], image_size=16))
        return save(self, where)

    monkeypatch.setattr(Takedowns, "save", save_after_a_rival)
    removal = take_down(store, Takedowns([("id", name(1000)), ("id", name(3))]))
    assert removal.snapshot.parent == calls[0].id
    assert removal.removed == 2


def test_orphans_wait_for_a_second_run(store, monkeypatch):
    a, orphan = make_part(store, 0)[0], make_part(store, 1000)[0]
    snapshot = publish(store, parent=None, parts=[a], image_size=16)
    assert collect_garbage(store).waiting == (f"parts/{orphan.id}/",)
    assert collect_garbage(store).objects == 0

    class Later(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(UTC) + timedelta(hours=169)

    monkeypatch.setattr(upkeep, "datetime", Later)
    assert collect_garbage(store, dry_run=True).groups == (f"parts/{orphan.id}/",)
    assert list(store.list(f"parts/{orphan.id}/"))
    collect_garbage(store)
    assert not list(store.list(f"parts/{orphan.id}/"))
    assert verify(store, snapshot) == []


def test_what_is_published_while_garbage_is_sought_stays(store, monkeypatch):
    a, waiting = make_part(store, 0)[0], make_part(store, 1000)[0]
    first, look = publish(store, parent=None, parts=[a], image_size=16), upkeep._groups

    def publish_meanwhile(where):
        found = look(where)
        publish(store, parent=first, parts=[a, waiting], image_size=16)
        return found

    monkeypatch.setattr(upkeep, "_groups", publish_meanwhile)
    assert collect_garbage(store, grace_hours=0).groups == ()
    assert verify(store, load_snapshot(store)) == []


def test_old_snapshots_go_but_what_newer_ones_share_stays(store):
    a, b, c = (make_part(store, start)[0] for start in (0, 1000, 2000))
    first = publish(store, parent=None, parts=[a, c], image_size=16)
    second = publish(store, parent=first, parts=[a, b], image_size=16)
    assert collect_garbage(store, keep=1, grace_hours=0).snapshots == (first.id,)
    assert verify(store, load_snapshot(store), read=True) == []
    assert not list(store.list(f"parts/{c.id}/"))
    assert load_snapshot(store) == second
    third = publish(store, parent=second, parts=[a, b, make_part(store, 3000)[0]], image_size=16)
    assert third.number == 3


def test_verify_names_what_is_wrong(store):
    part = make_part(store, 0)[0]
    snapshot = publish(store, parent=None, parts=[part], image_size=16)
    key = f"parts/{part.id}/mean/c/0/0/0/0"
    data = bytearray(store.read(key))
    data[5] ^= 1
    store.write(key, bytes(data))
    assert verify(store, snapshot) == []
    (problem,) = verify(store, snapshot, read=True)
    assert key in problem
    store.write(key, bytes(data[:-1]))
    assert verify(store, snapshot) == [f"{key} has {len(data) - 1} bytes instead of {len(data)}"]
    store.delete([key, f"parts/{part.id}/std/zarr.json", part.samples.key])
    assert len(verify(store, snapshot)) == 3
    store.delete([part.index.key])
    assert "index.parquet" in verify(store, snapshot)[0]


def test_difference_counts_samples_and_parts(store):
    a, b = make_part(store, 0)[0], make_part(store, 1000, 7)[0]
    first = publish(store, parent=None, parts=[a], image_size=16)
    second = publish(store, parent=first, parts=[a, b], image_size=16)
    third = take_down(store, Takedowns([("id", name(5))])).snapshot
    found = difference(store, first, third)
    assert (found.added, found.removed, found.total) == (7, 1, (40, 46))
    assert found.grids == {"2x3": (40, 46)}
    assert difference(store, second, second).parts_added == ()


def test_an_orphan_with_a_sample_taken_down_since_goes_at_once(store):
    """A killed compaction has left it, say, or a snapshot that held it went before the takedown."""
    a, _ = make_part(store, 0)[0], make_part(store, 1000)[0]
    (killed, _, _), (late, mean, _) = make_part(store, 2000), make_part(store, 3000)
    publish(store, parent=None, parts=[a], image_size=16)
    store.delete([killed.samples.key, late.samples.key])  # killed before they had a table
    take_down(store, Takedowns([("id", name(1007)), ("id", name(3003))]))
    asked = []

    def hopeless(parts, takedowns):
        asked.append((parts, takedowns.blocks([name(3003)], [None]).tolist()))
        return {late.id}

    garbage = collect_garbage(store, hopeless=hopeless)
    assert asked == [({killed.id, late.id}, [True])]
    assert garbage.waiting == (f"parts/{killed.id}/",)
    assert garbage.due is not None
    assert datetime.fromisoformat(garbage.due) > datetime.now(UTC) + timedelta(hours=167)
    assert {info.key.split("/")[1] for info in store.list("parts/")} == {a.id, killed.id}
    assert mean[3].tobytes() not in stored_bytes(store)


def test_caption_layers_that_no_snapshot_refers_to_go(store, tmp_path):
    text = TextIdentity(name="t", sha256="1")
    part = make_part(store, 0)[0]
    snapshot, layers = publish(store, parent=None, parts=[part], image_size=16), []
    for version in ("1", "2"):
        plan = LayerPlan(origin="eye", version=version, text=text)
        refs = [write_states(store, part, plan, k, np.full((rows, 2, 3), 1.5)) for k, rows in enumerate((16, 16, 8))]
        spec = part.captions[0].text.spec
        layers.append(add_layer(store, part, plan, [f"layer {version}"] * 40, (spec, refs)))
        store.write(f"{layer_folder(part, plan)}/layer.json", b"{}")
        kept = part.model_copy(update={"captions": (layers[-1],)})
        snapshot = publish(store, parent=snapshot, parts=[kept], image_size=16)
    assert collect_garbage(store, grace_hours=0).objects == 0  # older snapshots have them
    garbage = collect_garbage(store, keep=1, grace_hours=0)
    assert set(garbage.groups) > {f"parts/{part.id}/captions/0", layers[0].captions.key.rpartition("/")[0]}
    left = {info.key.removeprefix(f"parts/{part.id}/") for info in store.list(f"parts/{part.id}/")}
    layer = layers[1].captions.key.split("/")[3]
    assert {key for key in left if key.startswith(("captions", "text"))} == {
        f"captions/{layer}/{file}" for file in ("captions.parquet", "index.parquet", "layer.json")
    } | {"text/zarr.json"} | {f"text/{layer}/{file}" for file in ("c/0/0/0", "c/1/0/0", "c/2/0/0", "zarr.json")}
    assert verify(store, snapshot, read=True) == []
    batch = SnapshotReader(store, snapshot, tmp_path / "cache").gather(GRID, np.arange(40))
    assert set(batch.captions) == {"layer 2"}


def test_a_layer_waits_as_long_as_new_parts_get_it(store, monkeypatch):
    a, b = make_part(store, 0)[0], make_part(store, 1000)[0]
    publish(store, parent=None, parts=[a, b], image_size=16)
    plan = LayerPlan(origin="eye", version="1")

    class Later(datetime):
        hours = 0

        @classmethod
        def now(cls, tz=None):
            return datetime.now(UTC) + timedelta(hours=cls.hours)

    monkeypatch.setattr(upkeep, "datetime", Later)
    for Later.hours, part in ((0, a), (100, b)):
        folder = layer_folder(part, plan)
        add_layer(store, part, plan, ["seen"] * 40)
        assert folder in collect_garbage(store).waiting
    both = {layer_folder(a, plan), layer_folder(b, plan)}
    for Later.hours in (170, 267):
        assert set(collect_garbage(store).waiting) == both
    Later.hours = 269
    assert set(collect_garbage(store).groups) == both


def test_writes_that_died_are_swept_after_a_day(store):
    publish(store, parent=None, parts=[make_part(store, 0)[0]], image_size=16)
    half = Path(store.url) / "parts" / f".half.{'0' * 32}~"
    half.write_bytes(b"half")
    assert collect_garbage(store).unfinished == 0
    os.utime(half, (time.time() - 90_000,) * 2)
    assert collect_garbage(store, dry_run=True).unfinished == 1
    assert half.exists()
    assert collect_garbage(store).unfinished == 1
    assert not half.exists()
