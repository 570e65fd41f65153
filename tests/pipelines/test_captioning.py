"""Captioning in chunks: over HTTP from here, a model on Ray actors; what is committed is not asked again."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from pipelines import captioning as module
from pipelines.captioners import CaptionConfig, CaptionError, load_captioner
from pipelines.captioning import captioning, originals
from pipelines.originals import Picture
from starflow.objectstore import ObjectStore, open_store
from tests.pipelines.fake_captioners import COLOURS, save_tiny_blip, serve_endpoint
from tests.pipelines.ray_actors import actor_processes

NAMES = list(COLOURS)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    monkeypatch.setattr(module, "CHUNK", 4)
    return open_store(str(tmp_path / "store"))


def squares(store: ObjectStore, count: int) -> list[Picture]:
    """Red, green, blue, red ... pictures in one object."""
    data, pictures = b"", []
    for row in range(count):
        file = io.BytesIO()
        Image.new("RGB", (40, 40), COLOURS[NAMES[row % 3]]).save(file, "PNG")
        pictures.append(Picture(row, "crawl/0.tar", len(data), file.tell()))
        data += file.getvalue()
    store.write("crawl/0.tar", data)
    return pictures


@pytest.mark.parametrize("failures", [[], [200] * 5 + [401]])
def test_an_endpoint_is_asked_chunk_by_chunk_and_never_twice(store: ObjectStore, failures: list[int]) -> None:
    """Also after its budget or the endpoint's patience has ended in the middle of a chunk."""
    pictures = squares(store, 10)
    with serve_endpoint() as endpoint:
        endpoint.failures = list(failures)
        config = CaptionConfig(captioner=endpoint.url, captioner_model="m", caption_concurrency=1)
        broken = config.model_copy(update={"caption_budget": 60})  # of 100 tokens
        expected = pytest.raises(CaptionError, match="HTTP 401" if failures else "caption_budget is 60")
        with expected, captioning(store, broken) as captioner:
            captioner.captions("work/", pictures, ["x"] * 10)
        paid = captioner.pool.worker.captioner.tokens // 10
        assert paid == (5 if failures else 6)
        asked = len(endpoint.requests)
        with captioning(store, config) as captioner:
            found = captioner.captions("work/", pictures, ["x"] * 10)
            assert captioner.captions("work/", pictures, ["x"] * 10) == found
        assert found == ([f"A {NAMES[row % 3]} square." for row in range(10)], {})
        assert len(endpoint.requests) == asked + 10 - paid


def test_pictures_that_are_refused_have_empty_captions_and_are_counted(store: ObjectStore) -> None:
    pictures = squares(store, 10)
    with serve_endpoint() as endpoint:
        endpoint.refused = {"green": 400, "blue": 413}
        config = CaptionConfig(captioner=endpoint.url, captioner_model="m", caption_concurrency=1)
        broken = config.model_copy(update={"caption_budget": 20})  # of 40 tokens
        with pytest.raises(CaptionError, match="caption_budget is 20"), captioning(store, broken) as captioner:
            captioner.captions("work/", pictures, ["x"] * 10)
        with captioning(store, config) as captioner:
            found, refused = captioner.captions("work/", pictures, ["x"] * 10)
        assert found == ["" if row % 3 else "A red square." for row in range(10)]
        assert refused == {"refused:http_400": 3, "refused:http_413": 3}
        assert len(endpoint.requests) == 10


def test_pictures_that_are_gone_or_broken_have_empty_captions(store: ObjectStore) -> None:
    pictures = squares(store, 3)
    pictures[1] = pictures[1]._replace(size=10)
    pictures.append(Picture(3, "crawl/none.tar", 0, 10))
    assert list(originals(store, pictures)) == [0, 2]
    with serve_endpoint() as endpoint:
        config = CaptionConfig(captioner=endpoint.url, captioner_model="m")
        with captioning(store, config) as captioner:
            found = ["A red square.", "", "A blue square.", ""], {}
            assert captioner.captions("work/", pictures, [""] * 4) == found


@pytest.mark.slow
def test_a_model_captions_on_ray_and_survives_the_death_of_an_actor(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "blip").mkdir()
    save_tiny_blip(tmp_path / "blip")
    pictures = squares(store, 30)
    config = CaptionConfig(captioner=str(tmp_path / "blip"), actors=1, caption_tokens=5)
    with captioning(store, config) as captioner:
        actors = actor_processes("CaptionWorker")
        assert len(actors) == 1
        jobs = captioner.pool.map
        killed = []

        def map_and_kill(method, work):  # type: ignore[no-untyped-def]
            for answer in jobs(method, work):
                if not killed:
                    actors[0].kill()
                    killed.append(actors[0].pid)
                yield answer

        captioner.pool.map = map_and_kill  # type: ignore[method-assign]
        found, _ = captioner.captions("work/", pictures, [""] * 30)
    assert killed
    here = load_captioner(config)
    assert (captioner.name, captioner.version) == (here.name, here.version)
    assert found == here.caption(list(originals(store, pictures).values()), [""] * 30)
