"""Captioners: an endpoint that speaks the OpenAI protocol, and a tiny BLIP saved to disk."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from pipelines import captioners
from pipelines.captioners import (
    AltText,
    CaptionConfig,
    CaptionError,
    EndpointCaptioner,
    ModelCaptioner,
    RefusedError,
    load_captioner,
)
from tests.pipelines.fake_captioners import COLOURS, SEEN, Endpoint, save_tiny_blip, serve_endpoint


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with serve_endpoint() as endpoint:
        yield endpoint


def squares() -> list[Image.Image]:
    return [Image.new("RGB", (1000, 500), colour) for colour in COLOURS.values()]


def ask(endpoint: Endpoint, budget: int | None = None, rate: float = 0.0) -> EndpointCaptioner:
    return EndpointCaptioner(endpoint.url, "vision-1", "Describe. Alt: {alt}", 4, rate, 50, budget)


def failure(captioner: EndpointCaptioner) -> str:
    """The lasting failure that ends captioning."""
    (answer,) = captioner.caption(squares()[:1], ["x"])
    assert isinstance(answer, CaptionError)
    assert not isinstance(answer, RefusedError)
    return str(answer)


def test_alt_texts_lose_their_line_breaks() -> None:
    assert AltText().caption([], [" a\n b ", ""]) == ["a b", ""]


def test_an_endpoint_captions_in_order(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    captioner = ask(endpoint)
    assert captioner.caption(squares(), ["x", "y", "z"]) == [f"A {name} square." for name in COLOURS]
    assert set(endpoint.keys) == {"Bearer sk-test"}
    assert {body["model"] for body in endpoint.requests} == {"vision-1"}
    prompts = sorted(body["messages"][0]["content"][1]["text"] for body in endpoint.requests)
    assert prompts == ["Describe. Alt: x", "Describe. Alt: y", "Describe. Alt: z"]
    assert captioner.tokens == 30


def test_an_endpoint_is_sent_small_pictures(endpoint: Endpoint) -> None:
    ask(endpoint).caption(squares()[:1], ["x"])
    uri = endpoint.requests[0]["messages"][0]["content"][0]["image_url"]["url"]
    assert Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size == (768, 384)


def test_a_busy_endpoint_is_asked_again(endpoint: Endpoint) -> None:
    endpoint.failures = [429, 503, 0]
    assert ask(endpoint).caption(squares()[:1], ["x"]) == ["A red square."]
    assert len(endpoint.requests) == 4


@pytest.mark.parametrize(("failures", "requests"), [([401] * 9, 1), ([500] * 9, 3)])
def test_a_failing_endpoint_is_one_sentence(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, failures: list[int], requests: int
) -> None:
    monkeypatch.setattr(captioners, "ATTEMPTS", 3)
    endpoint.failures = failures
    captioner = ask(endpoint)
    assert re.search(f"HTTP {failures[0]}.*busy.*check captioner", failure(captioner))
    assert re.search(f"HTTP {failures[0]}", failure(captioner))  # asked no more
    assert len(endpoint.requests) == requests


@pytest.mark.parametrize("colours", [["green"], ["green", "blue"]])
def test_a_picture_that_is_refused_costs_no_other(endpoint: Endpoint, colours: list[str]) -> None:
    """Also when it comes first, and alone: a picture of ours shows whether the endpoint takes any."""
    endpoint.refused = dict.fromkeys(colours, 422)
    captioner = ask(endpoint)
    for images in (squares()[1:2], squares()):
        answers = captioner.caption(images, ["x"] * len(images))
        found = [answer.reason if isinstance(answer, RefusedError) else answer for answer in answers]
        wanted = ["http_422" if name in colours else f"A {name} square." for name in COLOURS]
        assert found == (wanted if len(images) > 1 else wanted[1:2])


def test_an_endpoint_that_refuses_every_picture_is_not_set_up(endpoint: Endpoint) -> None:
    endpoint.refused = dict.fromkeys(SEEN, 400)
    answers = ask(endpoint).caption(squares()[:2], ["x", "y"])
    assert not any(isinstance(answer, RefusedError) for answer in answers)
    assert all(re.search("HTTP 400: .*busy.*captioner_model", str(answer)) for answer in answers)
    assert len(endpoint.requests) == 3


def test_an_answer_of_another_shape_is_one_sentence(endpoint: Endpoint) -> None:
    endpoint.answer = {"choices": []}
    assert "without choices" in failure(ask(endpoint))


def test_the_budget_ends_captioning(endpoint: Endpoint) -> None:
    captioner = ask(endpoint, budget=20)
    captioner.caption(squares()[:2], ["x", "y"])
    assert "20 tokens, caption_budget is 20" in failure(captioner)


def test_the_version_follows_the_prompt() -> None:
    versions = {EndpointCaptioner("http://x", "m", prompt, 1, 0, 9, None).version for prompt in ("a", "b", "a")}
    assert len(versions) == 2


def test_an_endpoint_needs_a_model() -> None:
    with pytest.raises(CaptionError, match="captioner_model"):
        load_captioner(CaptionConfig(captioner="http://127.0.0.1:1/v1"))


def test_a_model_that_does_not_exist_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CaptionError, match=r"cannot load the captioner .*image-to-text"):
        load_captioner(CaptionConfig(captioner=str(tmp_path)))


def test_a_hugging_face_model_captions_in_batches(tmp_path: Path) -> None:
    save_tiny_blip(tmp_path)
    captioner = ModelCaptioner(str(tmp_path), batch_size=2, max_tokens=5)
    captions = captioner.caption(squares(), ["", "", ""])
    assert len(captions) == 3
    assert captions == [ModelCaptioner(str(tmp_path), 1, 5).caption([each], [""])[0] for each in squares()]
    assert len(captioner.version) == 12
