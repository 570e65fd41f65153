"""Captioners for tests: a server that speaks the OpenAI protocol, and a tiny BLIP of random weights."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
#: What is seen: the captioner's own picture, too, with which it finds out whether any is taken.
SEEN = COLOURS | {"grey": (128, 128, 128)}


class Endpoint:
    """Names the colour of the picture it is sent; `failures` are answered first, by status (0: an answer that breaks
    off), and pictures of the colours in `refused` always with its status."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.failures: list[int] = []
        self.refused: dict[str, int] = {}
        self.answer: Any = None
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.requests.append(body)
                endpoint.keys.append(self.headers["Authorization"])
                status = endpoint.failures.pop(0) if endpoint.failures else endpoint.refused.get(_colour(body), 200)
                text = json.dumps(endpoint.answer or _answer(body) if status in (0, 200) else {"error": "busy"})
                data = text.encode()
                self.send_response(status or 200)
                self.send_header("Content-Length", str(len(data) + (not status)))
                self.send_header("Retry-After", "0")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


def _colour(body: dict[str, Any]) -> str:
    uri = body["messages"][0]["content"][0]["image_url"]["url"]
    picture = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    pixel = picture.getpixel((0, 0))
    return min(SEEN, key=lambda c: sum(abs(a - b) for a, b in zip(SEEN[c], pixel, strict=True)))


def _answer(body: dict[str, Any]) -> dict[str, Any]:
    return {"choices": [{"message": {"content": f" A {_colour(body)} square.\n"}}], "usage": {"total_tokens": 10}}


@contextmanager
def serve_endpoint() -> Iterator[Endpoint]:
    """The endpoint, answering on a free loopback port."""
    endpoint = Endpoint()
    threading.Thread(target=endpoint.server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield endpoint
    finally:
        endpoint.server.shutdown()
        endpoint.server.server_close()


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
