"""Captioners: an endpoint that speaks the OpenAI protocol, and a tiny BLIP saved to disk."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipelines import captioners
from pipelines.captioners import AltText, CaptionError, EndpointCaptioner, ModelCaptioner, load_captioner
from pipelines.config import RefreshConfig

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class Endpoint:
    """Names the colour of the picture it is sent; `failures` are answered first, by status."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.failures: list[int] = []
        self.answer: Any = None
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.requests.append(body)
                endpoint.keys.append(self.headers["Authorization"])
                status = endpoint.failures.pop(0) if endpoint.failures else 200
                data = json.dumps(endpoint.answer or _answer(body) if status == 200 else {"error": "busy"}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Retry-After", "0")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


def _answer(body: dict[str, Any]) -> dict[str, Any]:
    uri = body["messages"][0]["content"][0]["image_url"]["url"]
    picture = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    pixel = picture.getpixel((0, 0))
    name = min(COLOURS, key=lambda c: sum(abs(a - b) for a, b in zip(COLOURS[c], pixel, strict=True)))
    return {"choices": [{"message": {"content": f" A {name} square.\n"}}], "usage": {"total_tokens": 10}}


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    threading.Thread(target=endpoint.server.serve_forever, args=(0.05,), daemon=True).start()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()


def squares() -> list[Image.Image]:
    return [Image.new("RGB", (1000, 500), colour) for colour in COLOURS.values()]


def ask(endpoint: Endpoint, budget: int | None = None, rate: float = 0.0) -> EndpointCaptioner:
    return EndpointCaptioner(endpoint.url, "vision-1", "Describe. Alt: {alt}", 4, rate, 50, budget)


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
    endpoint.failures = [429, 503]
    assert ask(endpoint).caption(squares()[:1], ["x"]) == ["A red square."]
    assert len(endpoint.requests) == 3


@pytest.mark.parametrize(("failures", "requests"), [([401] * 9, 1), ([500] * 9, 3)])
def test_a_failing_endpoint_is_one_sentence(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, failures: list[int], requests: int
) -> None:
    monkeypatch.setattr(captioners, "ATTEMPTS", 3)
    endpoint.failures = failures
    with pytest.raises(CaptionError, match=f"HTTP {failures[0]}.*check captioner"):
        ask(endpoint).caption(squares()[:1], ["x"])
    assert len(endpoint.requests) == requests


def test_an_answer_of_another_shape_is_one_sentence(endpoint: Endpoint) -> None:
    endpoint.answer = {"choices": []}
    with pytest.raises(CaptionError, match="without choices"):
        ask(endpoint).caption(squares()[:1], ["x"])


def test_the_budget_ends_captioning(endpoint: Endpoint) -> None:
    captioner = ask(endpoint, budget=20)
    captioner.caption(squares()[:2], ["x", "y"])
    with pytest.raises(CaptionError, match="20 tokens, caption_budget is 20"):
        captioner.caption(squares()[:1], ["x"])


def test_the_version_follows_the_prompt() -> None:
    versions = {EndpointCaptioner("http://x", "m", prompt, 1, 0, 9, None).version for prompt in ("a", "b", "a")}
    assert len(versions) == 2


def test_an_endpoint_needs_a_model() -> None:
    with pytest.raises(CaptionError, match="captioner_model"):
        load_captioner(RefreshConfig(urls="-", store="-", captioner="http://127.0.0.1:1/v1"))


def test_a_model_that_does_not_exist_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CaptionError, match="cannot be loaded"):
        load_captioner(RefreshConfig(urls="-", store="-", captioner=str(tmp_path)))


def test_a_hugging_face_model_captions_in_batches(tmp_path: Path) -> None:
    save_tiny_blip(tmp_path)
    captioner = ModelCaptioner(str(tmp_path), batch_size=2, max_tokens=5)
    captions = captioner.caption(squares(), ["", "", ""])
    assert len(captions) == 3
    assert captions == [ModelCaptioner(str(tmp_path), 1, 5).caption([each], [""])[0] for each in squares()]
    assert len(captioner.version) == 12


def save_tiny_blip(folder: Path) -> None:
    """A BLIP of random weights, a few thousand parameters, with a word-piece tokenizer."""
    import torch
    from transformers import (
        BertTokenizerFast,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "a", "red", "green", "blue", "square"]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(words), "encoder_hidden_size": 16, "projection_dim": 8, "bos_token_id": 5,
            "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}  # fmt: skip
    config = BlipConfig(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 16}, projection_dim=8)
    BlipForConditionalGeneration(config).save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
