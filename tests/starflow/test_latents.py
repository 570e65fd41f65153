"""Latent arrays: any Zarr reader opens them, the mapped shard reads the same rows, damage is noticed."""

import google_crc32c
import numpy as np
import pytest
import zarr

from starflow.errors import CorruptError
from starflow.latents import MappedShard, encode_shard, layout, map_file, write_metadata
from starflow.objectstore import open_store
from starflow.snapshots import ArraySpec


def rows(count, shape=(2, 3, 4)):
    return np.random.default_rng(0).normal(size=(count, *shape)).astype(np.float16)


def mapped(tmp_path, data, spec, count, chunk=4, shard=8):
    path = tmp_path / "shard"
    path.write_bytes(data)
    with path.open("rb") as file:
        return MappedShard(map_file(file), spec, count, chunk, shard, "the-shard")


@pytest.mark.parametrize("count", [1, 4, 8, 16, 21])
def test_zarr_opens_the_whole_part(tmp_path, count):
    store, values = open_store(str(tmp_path)), rows(count)
    values[3:8] = 0  # chunks of zeros must not vanish
    write_metadata(store, "p", {"mean": ArraySpec(shape=values.shape, dtype="float16")}, 4, 8)
    for k in range(-(-count // 8)):
        store.write(f"parts/p/mean/c/{k}/0/0/0", encode_shard(values[k * 8 : k * 8 + 8], 4, 8))
    group = zarr.open_group(str(tmp_path / "parts" / "p"), mode="r")
    assert np.array_equal(group["mean"][:], values)
    assert group["mean"].shards == (8, 2, 3, 4)
    assert group["mean"].compressors == ()


@pytest.mark.parametrize("count", [1, 5, 8])
def test_mapped_shard_gathers_rows(tmp_path, count):
    values = rows(count)
    shard = mapped(tmp_path, encode_shard(values, 4, 8), ArraySpec(shape=(99, 2, 3, 4), dtype="float16"), count)
    chosen = np.array([count - 1, 0, count // 2, 0])
    out = np.empty((4, 2, 3, 4), np.float16)
    shard.gather(chosen, out)
    assert np.array_equal(out, values[chosen])


def test_chunks_may_lie_in_any_order(tmp_path):
    values, chunk_bytes = rows(8), 4 * 24 * 2
    data = encode_shard(values, 4, 8)
    index = np.array([[chunk_bytes, chunk_bytes], [0, chunk_bytes]], "<u8").tobytes()
    swapped = data[chunk_bytes : 2 * chunk_bytes] + data[:chunk_bytes] + index
    swapped += google_crc32c.value(index).to_bytes(4, "little")
    shard = mapped(tmp_path, swapped, ArraySpec(shape=(8, 2, 3, 4), dtype="float16"), 8)
    out = np.empty((8, 2, 3, 4), np.float16)
    shard.gather(np.arange(8), out)
    assert np.array_equal(out, values)


@pytest.mark.parametrize("damage", ["index", "checksum", "short", "empty"])
def test_damage_is_noticed(tmp_path, damage):
    data = bytearray(encode_shard(rows(8), 4, 8))
    if damage == "index":
        data[-10] ^= 1
    elif damage == "checksum":
        data[-1] ^= 1
    else:
        data = data[: len(data) // 3] if damage == "short" else bytearray()
    with pytest.raises(CorruptError, match="the-shard"):
        mapped(tmp_path, bytes(data), ArraySpec(shape=(8, 2, 3, 4), dtype="float16"), 8)


def test_layout_follows_bytes_and_shares_small_parts():
    assert layout(10**7, 8192, 2 * 2**20, 128 * 2**20) == (256, 16384)
    assert layout(10**7, 2 * 2**20, 2 * 2**20, 128 * 2**20) == (1, 64)
    assert layout(2000, 2048, 2 * 2**20, 128 * 2**20) == (128, 128)
    assert layout(3, 2048, 2 * 2**20, 128 * 2**20) == (16, 16)
    assert layout(3, 2**30, 2 * 2**20, 128 * 2**20) == (1, 1)


def test_a_shard_has_a_limit():
    with pytest.raises(ValueError, match="9 rows"):
        encode_shard(rows(9), 4, 8)
