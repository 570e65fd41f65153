"""Encoding on Ray: the right latents in the right rows, corrupt inputs, kills, repeats, refusals."""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import types
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from PIL import Image

from pipelines.actors import Resources
from pipelines.encode import encode
from pipelines.encode_plan import EncodeConfig, make_plan
from pipelines.encode_shard import ShardEncoder, read_members
from pipelines.originals import Picture, spans
from starflow.encoders import EncoderError, TextIdentity, load_vae, new_autoencoder, to_tensor
from starflow.errors import CorruptError, StoreError
from starflow.images import decode_image, fit
from starflow.objectstore import open_store
from starflow.reader import SnapshotReader
from starflow.snapshots import publish
from starflow.takedowns import Takedowns
from tests.pipelines.fake_crawl import Bench, fake_encode, png, url
from tests.pipelines.ray_actors import actor_processes

BROKEN = (5, 17)


def picture(number, width, height):
    pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def crawl(store, count, key="crawl/0", broken=BROKEN):
    """A tar of pictures and the sample table over it, as a crawl leaves them; returns table key and bytes."""
    samples, contents, tar_bytes = [], {}, io.BytesIO()
    with tarfile.open(fileobj=tar_bytes, mode="w") as tar:
        for number in range(count):
            width, height = (24, 16) if number % 3 == 0 else (20, 20)
            data = b"not a picture" if number in broken else picture(number, width, height)
            info = tarfile.TarInfo(f"{number}.png")
            info.size = len(data)
            offset = tar.offset + 512
            tar.addfile(info, io.BytesIO(data))
            id = hashlib.sha256(f"{key} {number}".encode()).hexdigest()
            contents[id] = data
            caption = {"text": f"picture {number}", "origin": "alt-text", "version": "1", "weight": 1.0}
            samples.append(
                {"id": id, "url": f"http://x/{number}", "width": width, "height": height, "phash": number,
                 "licence": None, "captions": [caption],
                 "image": {"key": f"{key}.tar", "offset": offset, "size": len(data)}}
            )  # fmt: skip
    store.write(f"{key}.tar", tar_bytes.getvalue())
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(samples), buffer)
    store.write(f"{key}.parquet", buffer.getvalue())
    return f"{key}.parquet", contents


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    new_autoencoder(resolution=16, channels=2, widths=(8, 8), layers=1, groups=4).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "store"))


@pytest.fixture(scope="module")
def cluster():
    """One cluster for the tests that do not care who started it."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1",
             object_store_memory=100 * 2**20)  # fmt: skip
    yield
    ray.shutdown()


def config(vae_folder, **changes):
    values = {"image_size": 16, "vae": vae_folder, "aspect_ratios": ("1:1", "3:2"), "actors": 2} | changes
    return EncodeConfig(**values)


def check_latents(store, result, contents, vae_folder, tmp_path):
    """Every sample's latents are those of the bare VAE on its own picture."""
    vae = load_vae(vae_folder)
    snapshot = publish(store, parent=None, parts=result.parts, image_size=16)
    reader = SnapshotReader(store, snapshot, tmp_path / "cache")
    seen = []
    for grid, count in reader.counts.items():
        batch = reader.gather(grid, np.arange(count))
        seen += batch.ids
        for row in range(0, count, 5):
            image = fit(decode_image(contents[batch.ids[row]]), grid[0] * 2, grid[1] * 2)
            mean, std = vae.encode(to_tensor(image[None].copy()))
            np.testing.assert_allclose(batch.mean[row], mean[0], atol=2e-3, rtol=2e-3)
            np.testing.assert_allclose(batch.std[row], std[0], atol=2e-3, rtol=2e-3)
    return seen


def test_encodes_everything_once_and_resumes_for_nothing(store, vae_folder, tmp_path, monkeypatch):
    table, contents = crawl(store, 60)
    progress = []
    result = encode(store, [table], config(vae_folder), "crawl/work", lambda *numbers: progress.append(numbers))
    assert not ray.is_initialized()
    assert result.dropped == {"corrupt": 2}
    assert progress[-1][0] == progress[-1][1] == len(progress) >= 4
    assert {part.grid: (part.rows, part.count) for part in result.parts} == {(8, 8): (40, 38), (7, 10): (20, 20)}
    good = {id for id, data in contents.items() if data != b"not a picture"}
    assert sorted(check_latents(store, result, contents, vae_folder, tmp_path)) == sorted(good)
    monkeypatch.setattr("pipelines.actors._connect", lambda _: pytest.fail("a cluster was started for nothing"))
    assert encode(store, [table], config(vae_folder, actors=1), "crawl/work") == result


@pytest.mark.parametrize("kills", [1, pytest.param(2, marks=pytest.mark.slow)])  # at its third a shard is given up
def test_a_killed_actor_costs_nothing_but_time(cluster, store, vae_folder, tmp_path, kills):
    table, contents = crawl(store, 120, broken=())
    killed = []

    def kill_one(finished, total):
        running = actor_processes("ShardEncoder")
        if len(killed) < kills and running:
            running[0].kill()
            killed.append(finished)

    result = encode(store, [table], config(vae_folder), "crawl/work", kill_one)
    assert len(killed) == kills
    assert sorted(check_latents(store, result, contents, vae_folder, tmp_path)) == sorted(contents)


def test_what_garbage_collection_takes_meanwhile_is_made_again(cluster, store, vae_folder, tmp_path):
    table, contents = crawl(store, 20)
    taken = []

    def on_progress(done, total):
        if done == total and not taken:
            taken.extend(info.key for info in store.list("parts/") if "/mean/c/" in info.key)
            store.delete(taken[:1])

    result = encode(store, [table], config(vae_folder), "crawl/work", on_progress)
    assert taken
    assert len(check_latents(store, result, contents, vae_folder, tmp_path)) == 18


def test_errors_in_actors_come_through_in_one_sentence(cluster, store, tmp_path):
    table, _ = crawl(store, 10)
    with pytest.raises(EncoderError, match="no-such-vae"):
        encode(store, [table], config(str(tmp_path / "no-such-vae"), actors=1), "crawl/work")


def encode_here(store, table, settings):
    """Makes the shards in this process; `encode` then finds nothing left for actors to do."""
    encoder = ShardEncoder(store.url, settings, "crawl/work")
    plan = make_plan(store, "crawl/work/all", [table], settings, encoder.models(), Takedowns())
    for part in plan.parts:
        for index in range(part.plan.shards):
            encoder.encode(part, index)
    return encoder, plan, encode(store, [table], settings, "crawl/work")


def test_a_shard_finished_twice_is_the_same_shard(store, vae_folder):
    table, _ = crawl(store, 30)
    _, plan, result = encode_here(store, table, config(vae_folder))
    before = {info.key: info.etag for info in store.list("parts/")}
    late = ShardEncoder(store.url, config(vae_folder, vae_batch=3), "crawl/work")
    late.models()
    assert late.encode(plan.parts[0], 0).ref.candidates is not None
    assert {info.key: info.etag for info in store.list("parts/")} == before
    assert encode(store, [table], config(vae_folder), "crawl/work") == result


def test_parts_that_a_takedown_leaves_whole_are_not_encoded_again(store, vae_folder, monkeypatch):
    table, _ = crawl(store, 30)
    _, plan, result = encode_here(store, table, config(vae_folder))
    first, lost = publish(store, parent=None, parts=result.parts, image_size=16), plan.parts[0]
    taken = read_members(store, lost).read_row_group(0)["id"][0].as_py()
    publish(
        store, parent=first, parts=result.parts[1:], image_size=16, takedowns=Takedowns([("id", taken)]).save(store)
    )
    jobs = []

    @contextmanager
    def pool(worker, resources, *arguments):
        encoder = worker(*arguments)

        def run(method, wanted):
            for job in wanted:
                jobs.append(job[0].plan.id)
                yield job, encoder.encode(*job)

        yield types.SimpleNamespace(ask=lambda method: encoder.models(), map=run)

    monkeypatch.setattr("pipelines.encode.actor_pool", pool)
    again = encode(store, [table], config(vae_folder), "crawl/work")
    assert set(jobs) == {part.id for part in again.parts} - {part.id for part in result.parts}
    assert len({part.id for part in again.parts} & {part.id for part in result.parts}) == len(result.parts) - 1
    assert again.dropped == {"corrupt": 2, "taken down": 1}


def test_a_batch_that_does_not_fit_is_halved(store, vae_folder, monkeypatch):
    encoder = ShardEncoder(store.url, config(vae_folder, vae_batch=8), "crawl/work")
    pixels = np.stack([fit(decode_image(picture(number, 20, 20)), 16, 16) for number in range(7)])
    whole, fits, asked = encoder._encode(pixels), 2, []
    vae, _ = encoder.encoders
    real = vae.encode

    def small(batch):
        asked.append(len(batch))
        if len(batch) > fits:
            raise torch.OutOfMemoryError
        return real(batch)

    monkeypatch.setattr(vae, "encode", small)
    for ours, expected in zip(encoder._encode(pixels), whole, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-3)
    assert asked == [7, 4, 2, 2, 3, 2, 1]
    assert encoder.batch_size == fits
    fits = 0
    with pytest.raises(torch.OutOfMemoryError):
        encoder._encode(pixels)


def test_text_states_of_every_caption_are_stored(store, vae_folder, tmp_path, monkeypatch):
    class FakeText:
        identity, length, width = TextIdentity(name="fake", sha256="2"), 3, 5

        def encode(self, captions):
            return torch.stack([torch.full((3, 5), float(caption.split()[-1])) for caption in captions])

    monkeypatch.setattr("pipelines.encode_shard.load_text_encoder", lambda *_: FakeText())
    table, _ = crawl(store, 40)
    _, _, result = encode_here(store, table, config(vae_folder, text_encoder="fake", text_length=3))
    reader = SnapshotReader(store, publish(store, parent=None, parts=result.parts, image_size=16), tmp_path / "cache")
    for grid, count in reader.counts.items():
        batch = reader.gather(grid, np.arange(count))
        assert batch.text[:, 0, 0].tolist() == [float(caption.split()[-1]) for caption in batch.captions]


def test_lost_pictures_and_another_vae_are_named(store, vae_folder):
    table, _ = crawl(store, 10)
    encoder = ShardEncoder(store.url, config(vae_folder), "crawl/work")
    models = encoder.models()
    part = make_plan(store, "crawl/work", [table], config(vae_folder), models, Takedowns()).parts[0]
    store.delete(["crawl/0.tar"])
    with pytest.raises(CorruptError, match=r"crawl/0\.tar are gone"):
        encoder.encode(part, 0)
    other = part.plan.vae.model_copy(update={"sha256": "f" * 64})
    with pytest.raises(StoreError, match="ffffffffffff"):
        encoder.encode(part.model_copy(update={"plan": part.plan.model_copy(update={"vae": other})}), 0)


def test_only_corrupt_inputs_make_no_part(store, vae_folder):
    table, _ = crawl(store, 4, broken=range(4))
    _, _, result = encode_here(store, table, config(vae_folder))
    assert result.parts == ()
    assert result.dropped == {"corrupt": 4}


def test_pictures_are_fetched_in_ranges():
    near = [Picture(row, "a", 1000 * row, 900) for row in range(5)]
    far = [Picture(5, "a", 10**8, 10), Picture(6, "b", 0, 10)]
    assert [[p.row for p in span] for span in spans([*far, *reversed(near)])] == [[0, 1, 2, 3, 4], [5], [6]]
    large = [Picture(row, "a", row * 2**24, 2**24) for row in range(5)]
    assert [len(span) for span in spans(large)] == [2, 2, 1]


def test_the_settings_of_a_refresh_reach_the_actors(tmp_path, monkeypatch):
    bench, plans, pools = Bench(tmp_path, monkeypatch), [], []

    def spy(store, tables, config, work, on_progress):
        plans.append(config)
        with pytest.raises(KeyboardInterrupt):
            encode(store, tables, config, "crawl/spy")
        return fake_encode(store, tables, config, work, on_progress)

    def no_pool(worker, resources, *arguments):
        pools.append((worker, resources, arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr("pipelines.encode.encode", spy)
    monkeypatch.setattr("pipelines.encode.actor_pool", no_pool)
    settings = {"actors": 3, "cpus_per_actor": 2, "gpus_per_actor": 0.5, "patch": 2, "vae_batch": 7, "image_size": 64}
    bench.refresh(bench.write_list({url("a"): png(1)}), ray_address="auto", aspect_ratios=("1:1",), **settings)
    ((worker, resources, arguments),) = pools
    assert (worker, resources) == (ShardEncoder, Resources(3, 2, 0.5, "auto"))
    assert arguments[1] == plans[0]
    assert {name: getattr(plans[0], name) for name in settings} == settings
    assert plans[0].aspect_ratios == ("1:1",)


@pytest.mark.slow
def test_the_same_call_ends_the_same_after_kills_of_the_driver(store, vae_folder, tmp_path):
    table, _ = crawl(store, 200)
    other = open_store(str(tmp_path / "undisturbed"))
    crawl(other, 200)
    expected = encode(other, [table], config(vae_folder), "crawl/work")
    code = (
        "from pipelines.encode import encode; from pipelines.encode_plan import EncodeConfig\n"
        "from starflow.objectstore import open_store\n"
        f"config = EncodeConfig(**{config(vae_folder).model_dump()!r})\n"
        f"encode(open_store({store.url!r}), [{table!r}], config, 'crawl/work')"
    )
    for seconds in np.random.default_rng(0).uniform(4, 16, 8):
        child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    result = encode(store, [table], config(vae_folder), "crawl/work")
    assert [part.id for part in result.parts] == [part.id for part in expected.parts]
    assert [part.samples for part in result.parts] == [part.samples for part in expected.parts]
    assert result.dropped == expected.dropped
