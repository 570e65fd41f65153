"""Captioners: pictures and their alt texts in, one caption a picture out."""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Protocol

from PIL import Image
from pydantic import Field

from starflow.config import Config
from starflow.encoders import EncoderError, from_pretrained, weights_sha256
from starflow.errors import StarflowError

#: Pictures are sent, and shown to models, no larger than this.
MAX_SIDE = 768
#: Tries of one request, over about half a minute.
ATTEMPTS = 6
#: HTTP statuses that speak of one picture, or its prompt: it is broken, too large, of no known kind, or not wanted.
REFUSALS = frozenset((400, 413, 415, 422))


class CaptionError(StarflowError):
    """A captioner that cannot be used, or that keeps failing."""


class RefusedError(CaptionError):
    """One picture that the captioner refuses, for a `reason` such as http_400; of others it goes on to be asked."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class CaptionConfig(Config):
    """Which captioner, and what it may use."""

    captioner: str = Field(
        "alt",
        title="Captioner",
        description="alt (the list's own text), an OpenAI-compatible http(s) endpoint, "
        "or the Hugging Face id or path of an image-to-text model.",
    )
    captioner_model: str = Field("", title="Captioner model", description="Model name to ask an endpoint for.")
    caption_prompt: str = Field(
        "Describe this image in one sentence. Its alt text is: {alt}",
        title="Caption prompt",
        description="What an endpoint is asked; {alt} is the alt text.",
    )
    caption_concurrency: int = Field(
        16, title="Caption concurrency", description="Requests at once to an endpoint.", ge=1, le=1024
    )
    caption_rate: float = Field(
        0.0, title="Caption rate", description="Requests a second to an endpoint; 0 is no limit.", ge=0
    )
    caption_tokens: int = Field(
        100, title="Tokens per caption", description="Longer captions are cut there.", ge=1, le=4096
    )
    caption_budget: int | None = Field(
        None, title="Caption budget", description="Tokens an endpoint may use in one run; null: no limit.", ge=1
    )
    actors: int = Field(2, title="Ray actors", description="Processes on Ray that run the models.", ge=1, le=4096)
    cpus_per_actor: int = Field(1, title="CPUs per actor", description="CPU cores that Ray reserves for each.", ge=1)
    gpus_per_actor: float = Field(
        0, title="GPUs per actor", description="Share of a GPU that Ray reserves for each.", ge=0
    )
    ray_address: str | None = Field(
        None, title="Ray address", description="Cluster to work on: auto finds the running one; null starts one here."
    )

    @property
    def is_endpoint(self) -> bool:
        """Whether the captioner answers over HTTP, so that it needs no worker of ours."""
        return self.captioner.startswith(("http://", "https://"))


class Captioner(Protocol):
    """Anything with a name, a version that changes when its captions would, and `caption`."""

    @property
    def name(self) -> str:
        """Origin of its captions."""
        ...

    @property
    def version(self) -> str:
        """Version of its captions."""
        ...

    def caption(self, images: list[Image.Image], alts: list[str]) -> Sequence[str | CaptionError]:
        """For each picture, in order, its caption, empty when there is nothing to say, or why there is none.

        A RefusedError is about that picture; any other error ends captioning.
        """
        ...


class AltText:
    """The list's own text, with white space made single."""

    name, version = "alt-text", "1"

    def caption(self, images: list[Image.Image], alts: list[str]) -> list[str]:
        """Ignores the pictures."""
        return [" ".join(alt.split()) for alt in alts]


class EndpointCaptioner:
    """A vision model behind an OpenAI-compatible endpoint (vLLM and the like).

    The key, if it needs one, is read from OPENAI_API_KEY. Requests run side by side within `rate` a second; 429,
    5xx, time-outs and answers that break off are tried again, honouring Retry-After. The first lasting failure, such as
    `budget` tokens that are used up, ends captioning: no further picture is asked for.
    """

    def __init__(
        self, base: str, model: str, prompt: str, concurrency: int, rate: float, max_tokens: int, budget: int | None
    ) -> None:
        self.url = f"{base.rstrip('/')}/chat/completions"
        self.name, self.prompt = model, prompt
        self.version = hashlib.sha256(f"{prompt}\n{max_tokens}".encode()).hexdigest()[:12]
        self.max_tokens, self.budget = max_tokens, budget
        self.tokens = 0
        self._works = False  # once a picture has gone through
        self._failure: CaptionError | None = None
        self._interval = 1 / rate if rate else 0.0
        self._next_start = 0.0
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="caption")

    def caption(self, images: list[Image.Image], alts: list[str]) -> Sequence[str | CaptionError]:
        """Asks for all captions. An endpoint that takes no picture at all refuses none: that is a lasting failure."""
        answers = list(self._pool.map(self._answer, images, alts))
        refused = any(isinstance(answer, RefusedError) for answer in answers)
        if refused and not self._works:  # nothing has gone through yet: would a picture of ours?
            self._answer(Image.new("RGB", (MAX_SIDE, MAX_SIDE), "grey"), "")
        if self._works:
            return answers
        return [CaptionError(str(each)) if isinstance(each, RefusedError) else each for each in answers]

    def _answer(self, image: Image.Image, alt: str) -> str | CaptionError:
        if self._failure is not None:
            return self._failure
        try:
            text = self._ask(image, alt)
        except RefusedError as error:
            return error
        except CaptionError as error:
            self._failure = error
            return error
        self._works = True
        return text

    def _ask(self, image: Image.Image, alt: str) -> str:
        if self.budget is not None and self.tokens >= self.budget:
            raise CaptionError(
                f"captioning has used {self.tokens} tokens, caption_budget is {self.budget}; raise it, "
                "and run the same command again to go on from here"
            )
        content = [
            {"type": "image_url", "image_url": {"url": _data_uri(image)}},
            {"type": "text", "text": self.prompt.replace("{alt}", alt)},
        ]
        answer = self._post(
            {
                "model": self.name,
                "messages": [{"role": "user", "content": content}],
                "max_tokens": self.max_tokens,
                "temperature": 0,
            }
        )
        try:
            text = str(answer["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError) as error:
            raise CaptionError(f"{self.url} answered without choices[0].message.content: {answer!r:.200}") from error
        with self._lock:
            self.tokens += int((answer.get("usage") or {}).get("total_tokens", 0))
        return text.strip()

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        failure = ""
        for attempt in range(ATTEMPTS):
            self._wait_for_turn()
            wait = 0.5 * 2**attempt * random.uniform(0.5, 1.0)
            try:
                with urllib.request.urlopen(request, timeout=120) as response:
                    answer: dict[str, Any] = json.load(response)
                    return answer
            except urllib.error.HTTPError as error:
                failure = f"HTTP {error.code}: {_said(error)}"
                if error.code in REFUSALS:
                    raise RefusedError(self._no_caption(failure), f"http_{error.code}") from error
                if error.code not in (408, 409, 429) and error.code < 500:
                    break
                asked = error.headers.get("Retry-After", "")
                wait = min(float(asked), 60.0) if asked.isdigit() else wait
            except (OSError, ValueError, http.client.HTTPException) as error:
                failure = str(error)
            if attempt < ATTEMPTS - 1:
                time.sleep(wait)
        raise CaptionError(self._no_caption(failure))

    def _no_caption(self, failure: str) -> str:
        return (
            f"no caption from {self.url} for model {self.name!r}: {failure}; check captioner, captioner_model and "
            "OPENAI_API_KEY, then run the same command again to go on from here"
        )

    def _wait_for_turn(self) -> None:
        with self._lock:
            start = max(time.monotonic(), self._next_start)
            self._next_start = start + self._interval
        time.sleep(max(0.0, start - time.monotonic()))


def _said(error: urllib.error.HTTPError) -> str:
    """The beginning of the answer's body, as far as it comes."""
    with suppress(OSError, http.client.HTTPException):
        return error.read(200).decode("utf-8", "replace")
    return "(no text)"


def _data_uri(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    file = io.BytesIO()
    small.convert("RGB").save(file, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


class ModelCaptioner:
    """A Hugging Face image-to-text model (BLIP class), by id or path; on a GPU when there is one.

    Calls from several threads take turns.
    """

    def __init__(self, model: str, batch_size: int = 16, max_tokens: int = 100) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.name, self.batch_size, self.max_tokens = model, batch_size, max_tokens
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.processor = from_pretrained("captioner", model, AutoProcessor.from_pretrained)
            found = from_pretrained("captioner", model, AutoModelForImageTextToText.from_pretrained)
        except EncoderError as error:
            raise CaptionError(
                f"{error}; or write alt, an http(s) endpoint, or the Hugging Face id or path of another image-to-text "
                "model"
            ) from error
        self.model = found.eval().to(self.device)
        self.version = hashlib.sha256(f"{weights_sha256(self.model)}\n{max_tokens}".encode()).hexdigest()[:12]
        self._turn = threading.Lock()

    def caption(self, images: list[Image.Image], alts: list[str]) -> list[str]:
        """Ignores the alt texts; greedy decoding, so that the same picture gives the same caption."""
        import torch

        captions: list[str] = []
        for first in range(0, len(images), self.batch_size):
            batch = [image.convert("RGB") for image in images[first : first + self.batch_size]]
            with self._turn, torch.inference_mode():
                inputs = self.processor(images=batch, return_tensors="pt").to(self.device)
                tokens = self.model.generate(**inputs, max_new_tokens=self.max_tokens, do_sample=False)
            captions += self.processor.batch_decode(tokens, skip_special_tokens=True)
        return [caption.strip() for caption in captions]


def load_captioner(config: CaptionConfig) -> Captioner:
    """The captioner that the configuration names. Raises CaptionError for one that cannot be loaded."""
    name = config.captioner
    if name == "alt":
        return AltText()
    if config.is_endpoint:
        if not config.captioner_model:
            raise CaptionError(f"captioner {name} needs the model's name; set captioner_model")
        return EndpointCaptioner(
            name,
            config.captioner_model,
            config.caption_prompt,
            config.caption_concurrency,
            config.caption_rate,
            config.caption_tokens,
            config.caption_budget,
        )
    return ModelCaptioner(name, max_tokens=config.caption_tokens)
