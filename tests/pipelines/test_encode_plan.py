"""The encode plan: buckets, fixed members, caption layers, memory-bounded parts, one plan a request."""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import encode_plan
from pipelines.encode_plan import EncodeConfig, Models, buckets, load_plan, make_plan, nearest_bucket
from pipelines.encode_shard import read_members
from starflow.encoders import TextIdentity, VAEIdentity
from starflow.errors import StoreError
from starflow.objectstore import open_store
from starflow.takedowns import Takedowns

VAE = VAEIdentity(name="test", sha256="0" * 64, scaling_factor=1.0, channels=2, downsampling=2)
MODELS = Models(vae=VAE, text=TextIdentity(name="t", sha256="1"), text_shape=(4, 6))


def sample(number, width=100, height=100, captions=(("a", "alt-text", "1", 1.0),)):
    return {
        "id": hashlib.sha256(str(number).encode()).hexdigest(),
        "url": f"http://host{number % 3}.example/{number}",
        "width": width,
        "height": height,
        "phash": number,
        "licence": None,
        "captions": [dict(zip(("text", "origin", "version", "weight"), c, strict=True)) for c in captions],
        "image": {"key": "crawl/tar", "offset": 512 * number, "size": 100},
    }


def write_table(store, key, samples):
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(samples), buffer)
    store.write(key, buffer.getvalue().to_pybytes())
    return key


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path))


def test_buckets_keep_the_area_and_fit_the_unit():
    sizes = buckets(256, encode_plan.ASPECT_RATIOS, 16)
    assert len(sizes) == 9
    assert sizes[0] == (256, 256)
    assert (208, 320) in sizes  # 3:2
    for height, width in sizes:
        assert height % 16 == width % 16 == 0
        assert height * width == pytest.approx(256**2, rel=0.08)
    assert buckets(8, ("1:1", "10:9"), 8) == [(8, 8)]  # the same size twice is one bucket
    with pytest.raises(ValueError, match="'square'"):
        buckets(256, ("square",), 8)


def test_each_picture_takes_the_nearest_shape():
    sizes = buckets(256, encode_plan.ASPECT_RATIOS, 16)
    widths, heights = np.array([500, 900, 300, 2000]), np.array([510, 600, 900, 500])
    chosen = [sizes[i] for i in nearest_bucket(widths, heights, sizes)]
    assert chosen[0] == (256, 256)
    assert chosen[1] == (208, 320)
    assert chosen[2][0] > chosen[2][1]
    assert chosen[3] == (160, 384)  # as wide as it gets


def test_plan_has_every_sample_once_in_shards_of_its_bucket(store):
    config = EncodeConfig(image_size=16, shard_bytes=2**20)
    wide = [sample(i, width=200) for i in range(40)]
    square = [sample(100 + i) for i in range(70)]
    mixed = [s for pair in zip(wide, square[:40], strict=True) for s in pair] + square[40:]
    tables = [write_table(store, f"crawl/{n}.parquet", mixed[n::2]) for n in range(2)]
    plan = make_plan(store, "work", tables, config, MODELS, Takedowns())
    assert plan == make_plan(store, "work", tables, config, MODELS, Takedowns())
    assert plan == load_plan(store, "work", tables, config)
    seen = []
    for part in plan.parts:
        members = read_members(store, part)
        assert members.num_row_groups == part.plan.shards > 1
        for index in range(part.plan.shards):
            table = members.read_row_group(index)
            assert len(table) == part.plan.shard_rows(index)
            assert {w > 100 for w in table["width"].to_pylist()} == {part.plan.grid[0] < part.plan.grid[1]}
            seen += table["id"].to_pylist()
    assert sorted(seen) == sorted(s["id"] for s in mixed)


def test_a_plan_serves_no_other_request(store):
    key = write_table(store, "crawl/0.parquet", [sample(1)])
    make_plan(store, "work", [key], EncodeConfig(image_size=16), MODELS, Takedowns())
    assert load_plan(store, "other", [key], EncodeConfig(image_size=16)) is None
    assert load_plan(store, "work", [key], EncodeConfig(image_size=16, actors=7)) is not None
    for tables, size in (([key, key], 16), ([key], 32)):
        with pytest.raises(StoreError, match="other tables or settings"):
            load_plan(store, "work", tables, EncodeConfig(image_size=size))


def test_captions_of_one_origin_make_one_layer_each(store):
    samples = [
        sample(1, captions=[("one", "alt-text", "1", 0.5), ("two", "alt-text", "1", 0.5), ("m", "blip", "2", 1.0)]),
        sample(2, captions=[]),
        sample(3, captions=[("M", "blip", "2", 1.0), ("", "alt-text", "1", 0.5)]),
    ]
    key = write_table(store, "crawl/0.parquet", samples)
    plan = make_plan(store, "work", [key], EncodeConfig(image_size=16), MODELS, Takedowns())
    (part,) = plan.parts
    assert [(layer.origin, layer.weight) for layer in part.plan.layers] == [("alt-text", 0.5)] * 2 + [("blip", 1.0)]
    assert set(part.plan.arrays) == {"mean", "std", "text/0", "text/1", "text/2"}
    table = read_members(store, part).read()
    assert table["caption:0"].to_pylist() == ["one", None, None]
    assert table["caption:1"].to_pylist() == ["two", None, None]
    assert table["caption:2"].to_pylist() == ["m", None, "M"]


def test_large_buckets_are_cut_into_parts(store, monkeypatch):
    monkeypatch.setattr(encode_plan, "PART_SHARDS", 2)
    key = write_table(store, "crawl/0.parquet", [sample(i) for i in range(150)])
    config = EncodeConfig(image_size=16, shard_bytes=16 * 2 * 2 * 64)  # 16 rows a shard
    models = MODELS.model_copy(update={"text": None, "text_shape": None})
    plan = make_plan(store, "work", [key], config, models, Takedowns())
    assert [part.plan.rows for part in plan.parts] == [32, 32, 32, 32, 22]
    ids = [id for part in plan.parts for id in read_members(store, part).read()["id"].to_pylist()]
    assert ids == [sample(i)["id"] for i in range(150)]


def test_what_was_taken_down_stays_out(store):
    key = write_table(store, "crawl/0.parquet", [sample(i) for i in range(9)])
    takedowns = Takedowns([("host", "host1.example"), ("url", "http://host0.example/0"), ("id", sample(2)["id"])])
    plan = make_plan(store, "work", [key], EncodeConfig(image_size=16), MODELS, takedowns)
    assert plan.dropped == {"taken down": 5}
    assert read_members(store, plan.parts[0]).read()["phash"].to_pylist() == [3, 5, 6, 8]


def test_other_files_are_refused_by_name(store):
    store.write("crawl/bad.parquet", b"no parquet")
    with pytest.raises(StoreError, match=r"crawl/bad\.parquet is not a sample table"):
        make_plan(store, "work", ["crawl/bad.parquet"], EncodeConfig(), MODELS, Takedowns())
