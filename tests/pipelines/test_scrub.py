"""Scrubbing what finished refreshes left behind: pictures zeroed in place, rows gone, unfinished work untouched."""

import hashlib
import io
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.batches import CrawlRecord, commit_record
from pipelines.ledger import Ledger, put_table
from pipelines.plan import Batch
from pipelines.scrub import scrub_sources
from starflow import manifest
from starflow.encoders import VAEIdentity
from starflow.objectstore import open_store
from starflow.parts import part_from_arrays
from starflow.removal import take_down
from starflow.snapshots import publish
from starflow.takedowns import Takedowns

VAE = VAEIdentity(name="test", sha256="0" * 64, scaling_factor=1.0, channels=1, downsampling=8)


def content(number):
    return f"picture number {number}".encode() * 20


def sample_id(number):
    return hashlib.sha256(content(number)).hexdigest()


def make_batch(store, refresh, numbers):
    """A batch as a crawl leaves it: tar, tables, records and encode work."""
    folder = f"crawl/refreshes/{refresh:06d}/batches/000-000000/"
    buffer, offsets = io.BytesIO(), []
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in numbers:
            info = tarfile.TarInfo(f"{sample_id(number)}.png")
            info.size = len(content(number))
            offsets.append(tar.offset + 512)
            tar.addfile(info, io.BytesIO(content(number)))
    images = manifest.put(store, f"{folder}images-0.tar", buffer.getvalue())
    store.write(f"{folder}images-left-over.tar", buffer.getvalue())
    rows = {"key": [f"key{n}" for n in numbers], "url": [f"http://x/{n}" for n in numbers],
            "caption": [f"secret {n}" for n in numbers]}  # fmt: skip
    planned = put_table(store, f"crawl/refreshes/{refresh:06d}/plans/000", pa.table(rows))
    outcome = {"id": [sample_id(n) for n in numbers], "offset": offsets, "size": [len(content(n)) for n in numbers]}
    fetched = put_table(store, f"{folder}fetched", pa.table(rows | outcome))
    put_table(store, f"{folder}captions", pa.table({"key": rows["key"], "captions": rows["caption"]}))
    batch = Batch(folder=folder, rows=planned, count=len(rows["key"]))
    commit_record(store, batch, CrawlRecord(images=images, fetched=fetched, statuses={}, reasons={}, examples={}))
    store.write(f"crawl/refreshes/{refresh:06d}/encode/x/plan.json", b"secret 3")
    return images.key


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "store"))


def traces(store, prefix, number):
    """Keys of objects that still know the picture."""
    found = []
    for info in store.list(prefix):
        data = store.read(info.key)
        if info.key.endswith(".parquet"):
            data = str(pq.read_table(io.BytesIO(data)).to_pylist()).encode()
        if content(number) in data or f"secret {number}".encode() in data:
            found.append(info.key)
    return found


def test_finished_refreshes_are_scrubbed_in_place(store):
    tars = [make_batch(store, refresh, range(10 * refresh, 10 * refresh + 6)) for refresh in (1, 2, 3)]
    for _ in range(2):  # refreshes 1 and 2 are finished, 3 is at work
        Ledger(store, 1).commit(None, {}, ())
    latents = np.ones((2, 1, 2, 2), np.float16)
    samples = pa.table({"id": [sample_id(13), sample_id(14)], "url": ["http://x/13", "http://x/14"]})
    publish(store, parent=None, parts=[part_from_arrays(store, VAE, latents, latents, samples)], image_size=16)
    assert scrub_sources(store) == 0
    take_down(store, Takedowns([("url", "http://x/13"), ("url", "http://x/33")]))

    before = store.read(tars[0])
    assert len(traces(store, "crawl/refreshes/000001/", 13)) == 5
    assert scrub_sources(store) == 1
    assert traces(store, "crawl/refreshes/000001/", 13) == []
    after = store.read(tars[0])
    assert len(after) == len(before)
    assert all(content(n) in after for n in (10, 11, 12, 14, 15))
    assert len(traces(store, "crawl/refreshes/000001/", 14)) == 4
    assert len(traces(store, "crawl/refreshes/000003/", 33)) == 5
    assert scrub_sources(store) == 0


def test_pictures_are_erased_without_their_tar_in_memory(store, monkeypatch):
    """A tar has gigabytes: of 10,000 pictures."""
    make_batch(store, 1, range(6))
    Ledger(store, 1).commit(None, {}, ())
    latents = np.ones((2, 1, 2, 2), np.float16)
    samples = pa.table({"id": ["a", "b"], "url": ["http://x/a", "http://x/b"]})
    publish(store, parent=None, parts=[part_from_arrays(store, VAE, latents, latents, samples)], image_size=16)
    take_down(store, Takedowns([("url", "http://x/3"), ("url", "http://x/a")]))
    read, whole = type(store).read, []

    def spy(self, key, start=None, length=None):
        whole.extend([key] if key.endswith(".tar") and length is None else [])
        return read(self, key, start, length)

    monkeypatch.setattr(type(store), "read", spy)
    assert scrub_sources(store) == 1
    assert not whole


def test_a_refresh_at_work_is_scrubbed_once_it_has_finished(store):
    make_batch(store, 1, range(6))
    latents = np.ones((2, 1, 2, 2), np.float16)
    samples = pa.table({"id": ["a", "b"], "url": ["http://x/a", "http://x/3"]})
    publish(store, parent=None, parts=[part_from_arrays(store, VAE, latents, latents, samples)], image_size=16)
    take_down(store, Takedowns([("url", "http://x/3")]))
    assert scrub_sources(store) == 0
    assert traces(store, "crawl/", 3)
    Ledger(store, 1).commit(None, {}, ())
    assert scrub_sources(store) == 1
    assert traces(store, "crawl/", 3) == []
