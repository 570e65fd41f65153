"""Text states or labels for a batch: stored with the snapshot, or computed by the frozen text encoder."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from starflow.cache import FileCache
from starflow.encoders import TextIdentity
from starflow.errors import ConfigError, CorruptError
from starflow.model import FlowConfig
from starflow.snapshots import TextStates
from training.config import TrainConfig

#: Text states of so many captions stay in memory when the encoder runs in the trainer.
REMEMBERED_CAPTIONS = 4096


class Conditioner(Protocol):
    """Captions, their stored states if any, and which are dropped, to the condition and the seconds it took."""

    identity: TextIdentity | None

    def __call__(
        self, captions: list[str], states: NDArray[np.float16] | None, dropped: NDArray[np.bool_]
    ) -> tuple[Tensor | None, float]: ...


def make_conditioner(config: TrainConfig, flow: FlowConfig, stored: TextStates | None, device: str) -> Conditioner:
    """The conditioner that `flow` needs. Raises ConfigError when its text encoder does not fit."""
    if flow.classes:
        return Labels(flow.classes)
    if not flow.text_length:
        return Unconditional()
    assert config.text_encoder is not None  # training/architecture.py has seen to that
    shape = (flow.text_length, flow.text_width)
    if stored and stored.encoder.name == config.text_encoder and tuple(stored.spec.shape[1:]) == shape:
        return StoredText(config, stored, shape)
    return EncodedText(config.text_encoder, shape, device)


class Unconditional:
    """For flows that see pictures only."""

    identity: TextIdentity | None = None

    def __call__(
        self, captions: list[str], states: NDArray[np.float16] | None, dropped: NDArray[np.bool_]
    ) -> tuple[Tensor | None, float]:
        return None, 0.0


class Labels:
    """For class-conditional flows: captions are class numbers; dropped ones become "no label"."""

    identity: TextIdentity | None = None

    def __init__(self, classes: int) -> None:
        self.classes = classes

    def __call__(
        self, captions: list[str], states: NDArray[np.float16] | None, dropped: NDArray[np.bool_]
    ) -> tuple[Tensor | None, float]:
        for caption in captions:
            if not caption.isdecimal() or int(caption) >= self.classes:
                raise ConfigError(
                    f"caption {caption!r} is not a class number below {self.classes}; "
                    "use a text-conditional preset, or a snapshot whose captions are class numbers"
                )
        labels = torch.tensor([int(caption) for caption in captions])
        return labels.masked_fill(torch.from_numpy(dropped), self.classes), 0.0


class StoredText:
    """Text states from the snapshot."""

    def __init__(self, config: TrainConfig, stored: TextStates, shape: tuple[int, int]) -> None:
        self.identity: TextIdentity | None = stored.encoder
        self._null = torch.from_numpy(_null_state(config.cache / "null-captions", stored.encoder, shape))

    def __call__(
        self, captions: list[str], states: NDArray[np.float16] | None, dropped: NDArray[np.bool_]
    ) -> tuple[Tensor | None, float]:
        assert states is not None  # the reader gives them whenever the snapshot describes them
        condition = torch.from_numpy(states).float()
        condition[torch.from_numpy(dropped)] = self._null
        return condition, 0.0


def _null_state(folder: Path, identity: TextIdentity, shape: tuple[int, int]) -> NDArray[np.float32]:
    """(L, E) state of the null caption, kept on disk so that later starts need not load the encoder."""

    def encode(path: Path) -> None:
        from starflow.encoders import load_text_encoder

        encoder = load_text_encoder(identity.name, shape[0])
        if encoder.identity.sha256 != identity.sha256:
            raise ConfigError(
                f"the snapshot's text states are from {identity.name} with weights {identity.sha256[:12]}, "
                f"{identity.name} here has {encoder.identity.sha256[:12]}; use the snapshot's version"
            )
        with path.open("wb") as file:
            np.save(file, encoder.encode([""])[0].float().cpu().numpy())

    return FileCache(folder).read(f"{identity.sha256}-{shape[0]}.npy", encode, _load_array)


def _load_array(file: BinaryIO) -> NDArray[np.float32]:
    try:
        array: NDArray[np.float32] = np.load(file)
    except (EOFError, ValueError) as error:
        raise CorruptError(f"{file.name} is corrupt: {error}; delete it") from error
    return array


class EncodedText:
    """Text states from the frozen encoder, run here; captions seen lately are remembered."""

    def __init__(self, spec: str, shape: tuple[int, int], device: str) -> None:
        from starflow.encoders import load_text_encoder

        self._encoder = load_text_encoder(spec, shape[0], device)
        if self._encoder.width != shape[1]:
            raise ConfigError(
                f"text encoder {spec} gives states {self._encoder.width} wide, the model expects {shape[1]}; "
                "choose the encoder that the preset was made for"
            )
        self.identity: TextIdentity | None = self._encoder.identity
        self._known: OrderedDict[bytes, Tensor] = OrderedDict()
        self._lock = threading.Lock()  # batches are made ahead in a thread while validation asks, too

    def __call__(
        self, captions: list[str], states: NDArray[np.float16] | None, dropped: NDArray[np.bool_]
    ) -> tuple[Tensor | None, float]:
        began = time.monotonic()
        wanted = ["" if drop else caption for caption, drop in zip(captions, dropped, strict=True)]
        with self._lock:
            condition = self._states(wanted)
        return condition, time.monotonic() - began

    def _states(self, wanted: list[str]) -> Tensor:
        keys = [hashlib.sha256(caption.encode()).digest() for caption in wanted]
        unknown = {key: caption for key, caption in zip(keys, wanted, strict=True) if key not in self._known}
        if unknown:
            with torch.no_grad():
                encoded = self._encoder.encode(list(unknown.values())).float().cpu()
            self._known.update(zip(unknown, encoded, strict=True))
        condition = torch.stack([self._known[key] for key in keys])
        for key in keys:
            self._known.move_to_end(key)
        while len(self._known) > REMEMBERED_CAPTIONS:
            self._known.popitem(last=False)
        return condition
