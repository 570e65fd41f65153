"""Re-captioning: new layers over the same latents, from originals or latents; resumed, repeated, rebased, weighted."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from pipelines import captioning, recaption_worker
from pipelines import recaption as module
from pipelines.actors import JOBS_IN_HAND
from pipelines.captioners import CaptionError
from pipelines.recaption import RecaptionConfig, RecaptionResult, recaption
from starflow.cli import app
from starflow.encoders import TextIdentity, load_vae, new_autoencoder, to_tensor
from starflow.errors import ConfigError, StoreError
from starflow.images import fit
from starflow.objectstore import LocalStore, ObjectStore, open_store
from starflow.parts import LayerPlan, part_from_arrays
from starflow.reader import SnapshotReader
from starflow.removal import take_down
from starflow.snapshots import Part, Snapshot, load_snapshot, publish
from starflow.takedowns import Takedowns
from starflow.upkeep import collect_garbage, verify
from tests.mortal_store import die_everywhere
from tests.pipelines.fake_captioners import COLOURS, Endpoint, save_tiny_blip, serve_endpoint

COUNT, GRID = 22, (8, 8)
NAMES = list(COLOURS)
TEXT = TextIdentity(name="fake", sha256="2")


class FakeText:
    """States that tell which caption they belong to."""

    identity, length, width = TEXT, 3, 5

    def encode(self, captions: list[str]) -> torch.Tensor:
        return torch.stack([torch.full((3, 5), float(len(caption))) for caption in captions])


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("vae")
    new_autoencoder(resolution=16, channels=2, widths=(8, 8), layers=1, groups=4).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with serve_endpoint() as endpoint:
        yield endpoint


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    for each in (captioning, recaption_worker, module):
        monkeypatch.setattr(each, "CHUNK", 4)
    monkeypatch.setattr(recaption_worker, "load_text_encoder", lambda *_: FakeText())
    return open_store(str(tmp_path / "store"))


def add_part(store: ObjectStore, vae_folder: str, start: int = 0, text: bool = False) -> Part:
    """COUNT coloured squares with their original bytes in a tar, row 5 a hole, and alt texts."""
    vae = load_vae(vae_folder)
    data, samples, pixels = b"", [], []
    for number in range(start, start + COUNT):
        file, image = io.BytesIO(), Image.new("RGB", (24, 24), COLOURS[NAMES[number % 3]])
        image.putpixel((23, 23), (number % 256, number // 256, 0))  # no two files are the same
        image.save(file, "PNG")
        content = file.getvalue()
        samples.append(
            {"id": hashlib.sha256(content).hexdigest(), "url": f"http://x/{number}", "image_key": f"crawl/{start}.tar",
             "image_offset": len(data), "image_size": len(content)}
        )  # fmt: skip
        data += content
        pixels.append(fit(image, 16, 16))
    samples[5]["id"] = None
    store.write(f"crawl/{start}.tar", data)
    mean, std = vae.encode(to_tensor(np.stack(pixels)))
    layer = LayerPlan(origin="alt-text", version="1", weight=1.0, text=TEXT if text else None)
    alts = [f"alt {number}" for number in range(start, start + COUNT)]
    states = [FakeText().encode(alts).half().numpy()] if text else []
    return part_from_arrays(
        store, vae.identity, mean.half().numpy(), std.half().numpy(), pa.Table.from_pylist(samples), [(layer, alts)],
        states, shard_bytes=16 * 2 * 128, chunk_bytes=8 * 2 * 128,
    )  # fmt: skip


def ask(store: ObjectStore, endpoint: Endpoint | None, **settings: Any) -> RecaptionResult:
    if endpoint is not None:
        settings = {"captioner": endpoint.url, "captioner_model": "eye", "caption_concurrency": 2} | settings
    return recaption(RecaptionConfig(store=store.url, **settings))


def expected(start: int = 0) -> list[str]:
    return [f"A {NAMES[number % 3]} square." for number in range(start, start + COUNT) if number != start + 5]


def captions(store: ObjectStore, snapshot: Snapshot, cache: Path, origin: str = "eye") -> list[str]:
    reader = SnapshotReader(store, snapshot, cache)
    return [texts[0] for texts in reader.captions(GRID, np.arange(reader.count(GRID)), origin)]


@pytest.mark.parametrize("text", [False, True])
def test_a_layer_is_added_and_no_latent_written(
    store: ObjectStore, vae_folder: str, endpoint: Endpoint, tmp_path: Path, text: bool
) -> None:
    first = publish(store, parent=None, parts=[add_part(store, vae_folder, text=text)], image_size=16)
    latents = {i.key: i.etag for i in store.list("parts/") if "/mean/" in i.key or "/std/" in i.key}
    result = ask(store, endpoint, weight=3.0, other_weights={"alt-text": 0.5})
    assert (result.captioned, result.reused, result.total, result.parent) == (COUNT - 1, 0, COUNT - 1, first.id)
    assert result.pictures == {"original": COUNT - 1, "decoded": 0}
    assert result.quality["pictures"] == COUNT - 1
    assert result.quality["repeated"] == COUNT - 1 - 3
    second = load_snapshot(store)
    assert second.id == result.snapshot
    assert second.counts.model_dump() == {"added": 0, "kept": COUNT - 1, "total": COUNT - 1}
    assert [(layer.origin, layer.weight) for layer in second.parts[0].captions] == [("alt-text", 0.5), ("eye", 3.0)]
    assert second.parts[0].id == first.parts[0].id
    assert second.parts[0].index == first.parts[0].index
    assert {i.key: i.etag for i in store.list("parts/") if "/mean/" in i.key or "/std/" in i.key} == latents
    assert captions(store, second, tmp_path / "cache") == expected()
    prompts = {body["messages"][0]["content"][1]["text"] for body in endpoint.requests}
    assert "Describe this image in one sentence. Its alt text is: alt 7" in prompts
    assert verify(store, second, read=True) == []
    reader = SnapshotReader(store, second, tmp_path / "cache")
    batch = reader.gather(GRID, np.arange(COUNT - 1))
    assert batch.captions == expected()
    if text:
        assert batch.text is not None
        assert batch.text[:, 0, 0].tolist() == [len(caption) for caption in expected()]
    else:
        assert batch.text is None


def test_the_same_again_asks_nothing_and_gives_the_same(
    store: ObjectStore, vae_folder: str, endpoint: Endpoint, tmp_path: Path
) -> None:
    publish(store, parent=None, parts=[add_part(store, vae_folder)], image_size=16)
    first = ask(store, endpoint)
    asked = len(endpoint.requests)
    again = ask(store, endpoint)
    assert (again.snapshot, again.captioned, again.reused) == (first.snapshot, 0, COUNT - 1)
    assert ask(store, endpoint, snapshot="1").snapshot == first.snapshot
    assert len(endpoint.requests) == asked
    other = open_store(str(tmp_path / "other"))
    publish(other, parent=None, parts=[add_part(other, vae_folder)], image_size=16)
    assert ask(other, endpoint).snapshot == first.snapshot
    with pytest.raises(ConfigError, match="write newest"):
        ask(store, endpoint, snapshot="1", weight=9.0)


def test_a_budget_that_ends_and_refused_pictures_cost_nothing(
    store: ObjectStore, vae_folder: str, endpoint: Endpoint
) -> None:
    parts = [add_part(store, vae_folder), add_part(store, vae_folder, 100)]
    publish(store, parent=None, parts=parts, image_size=16)
    with pytest.raises(CaptionError, match="caption_budget"):
        ask(store, endpoint, caption_budget=200)  # 20 of 42 pictures
    asked = len(endpoint.requests)
    assert asked >= 20
    endpoint.refused = {"red": 422}
    result = ask(store, endpoint)
    assert result.captioned == 2 * (COUNT - 1) - asked
    ours = len(endpoint.requests) - asked - result.captioned
    assert 0 <= ours <= JOBS_IN_HAND  # a grey square from each thread that had only red ones at first
    assert 0 < result.quality["refused:http_422"] == result.quality["empty"] < result.captioned
    assert not [info.key for info in store.list("parts/") if "/chunks-" in info.key]


def test_lost_originals_are_decoded_from_latents(
    store: ObjectStore, vae_folder: str, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [add_part(store, vae_folder), add_part(store, vae_folder, 100)]
    publish(store, parent=None, parts=parts, image_size=16)
    data = bytearray(store.read("crawl/100.tar"))
    data[:60] = bytes(60)  # as scrubbing leaves it
    store.write("crawl/100.tar", bytes(data))
    store.delete(["crawl/0.tar"])
    assert ask(store, endpoint).pictures == {"original": COUNT - 2, "decoded": COUNT}
    sizes = {fetched_size(body) for body in endpoint.requests}
    assert sizes == {(24, 24), (16, 16)}
    monkeypatch.setattr(recaption_worker, "load_vae", lambda *_: load_vae("emoji"))
    with pytest.raises(StoreError, match="is not the VAE"):
        ask(store, endpoint, caption_prompt="Other words.")


def fetched_size(body: dict[str, Any]) -> tuple[int, int]:
    import base64

    uri = body["messages"][0]["content"][0]["image_url"]["url"]
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size


def test_other_versions_are_replaced_or_kept(
    store: ObjectStore, vae_folder: str, endpoint: Endpoint, tmp_path: Path
) -> None:
    publish(store, parent=None, parts=[add_part(store, vae_folder)], image_size=16)
    ask(store, endpoint)
    ask(store, endpoint, caption_prompt="Shorter.")
    assert [layer.origin for layer in load_snapshot(store).parts[0].captions] == ["alt-text", "eye"]
    asked = len(endpoint.requests)
    ask(store, endpoint, replace=False)  # the first prompt's captions are still there
    assert len(endpoint.requests) == asked
    assert [layer.origin for layer in load_snapshot(store).parts[0].captions] == ["alt-text", "eye", "eye"]
    weighed = ask(store, None, other_weights={"alt-text": 0.0})
    assert (weighed.captioned, weighed.captioner) == (0, None)
    assert [layer.weight for layer in load_snapshot(store).parts[0].captions] == [0.0, 1.0, 1.0]
    with pytest.raises(ConfigError, match=r"\['alt'\].*alt-text.*eye"):
        ask(store, None, other_weights={"alt": 1.0})
    with pytest.raises(ConfigError, match="alt texts already"):
        ask(store, None, captioner="alt")


def test_it_goes_on_top_of_what_others_publish(
    store: ObjectStore, vae_folder: str, endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [add_part(store, vae_folder), add_part(store, vae_folder, 100)]
    first = publish(store, parent=None, parts=parts[:1], image_size=16)
    real = module.publish

    def race(*arguments: Any, **settings: Any) -> Snapshot:
        monkeypatch.setattr(module, "publish", real)
        publish(store, parent=first, parts=parts, image_size=16)
        return real(*arguments, **settings)

    monkeypatch.setattr(module, "publish", race)
    result = ask(store, endpoint)
    assert len(endpoint.requests) == result.captioned == 2 * (COUNT - 1)
    assert load_snapshot(store).number == 3
    assert captions(store, load_snapshot(store), tmp_path / "cache") == expected() + expected(100)


@pytest.mark.parametrize("setting", ["weight=-1", "weight=.inf", "other_weights={alt-text: -2}",
                                     "other_weights={alt-text: .nan}", "weight=2"])  # fmt: skip
def test_weights_that_mean_nothing_are_refused(store: ObjectStore, vae_folder: str, setting: str) -> None:
    first = publish(store, parent=None, parts=[add_part(store, vae_folder)], image_size=16)
    with pytest.raises(ConfigError, match="weight"):
        CliRunner().invoke(app, ["recaption", "--store", store.url, setting], catch_exceptions=False)
    assert load_snapshot(store).id == first.id


def test_takedown_takes_the_new_captions_too(
    store: ObjectStore, vae_folder: str, endpoint: Endpoint, tmp_path: Path
) -> None:
    publish(store, parent=None, parts=[add_part(store, vae_folder, text=True)], image_size=16)
    ask(store, endpoint)
    old = load_snapshot(store).parts[0]
    removal = take_down(store, Takedowns([("url", "http://x/3")]))
    collect_garbage(store)
    assert not list(store.list(f"parts/{old.id}/"))
    assert verify(store, removal.snapshot, read=True) == []
    left = [caption for number, caption in enumerate(expected()) if number != 3]
    assert captions(store, removal.snapshot, tmp_path / "cache") == left
    batch = SnapshotReader(store, removal.snapshot, tmp_path / "cache").gather(GRID, np.arange(COUNT - 2))
    assert batch.text is not None
    assert batch.text[:, 0, 0].tolist() == [len(caption) for caption in batch.captions]


def test_nothing_to_draw_is_refused(store: ObjectStore, vae_folder: str, endpoint: Endpoint) -> None:
    first = publish(store, parent=None, parts=[add_part(store, vae_folder)], image_size=16)
    for captioner, settings in (
        (None, {"other_weights": {"alt-text": 0.0}}),
        (endpoint, {"other_weights": {"alt-text": 0.0}, "weight": 0.0}),
    ):
        with pytest.raises(ConfigError, match=r"captions from alt-text\) without any caption.*weight above 0"):
            ask(store, captioner, **settings)
    assert (len(endpoint.requests), load_snapshot(store).id) == (0, first.id)
    ask(store, endpoint, weight=0.0)
    with pytest.raises(ConfigError, match="captions from alt-text, eye"):
        ask(store, None, other_weights={"alt-text": 0.0})
    ask(store, None, other_weights={"alt-text": 0.0, "eye": 1.0})
    assert [layer.weight for layer in load_snapshot(store).parts[0].captions] == [0.0, 1.0]


@pytest.mark.parametrize("text", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_killed_at_any_change_it_ends_the_same(
    store: ObjectStore, vae_folder: str, endpoint: Endpoint, tmp_path: Path, text: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [add_part(store, vae_folder, text=text), add_part(store, vae_folder, 100, text=text)]
    publish(store, parent=None, parts=parts, image_size=16)
    monkeypatch.setattr(module, "open_store", lambda url: opened[url])
    monkeypatch.setattr(captioning, "open_store", lambda url: opened[url])
    opened: dict[str, LocalStore] = {}

    def work(each: LocalStore) -> None:
        opened[each.url] = each
        ask(each, endpoint)

    assert isinstance(store, LocalStore)
    assert die_everywhere(tmp_path, store, work) > 15


@pytest.mark.slow
def test_the_command_with_a_model_on_ray(
    store: ObjectStore, vae_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # actors would not know of it
    publish(store, parent=None, parts=[add_part(store, vae_folder)], image_size=16)
    (tmp_path / "blip").mkdir()
    save_tiny_blip(tmp_path / "blip")
    arguments = ["recaption", "newest", "--store", store.url, "--captioner", str(tmp_path / "blip"), "--json"]
    answer = CliRunner().invoke(app, [*arguments, "actors=1", "caption_tokens=4"], catch_exceptions=False)
    result = json.loads(answer.stdout)
    assert (result["captioned"], result["snapshot"]) == (COUNT - 1, load_snapshot(store).id)
    assert result["captioner"].startswith(str(tmp_path / "blip"))
