"""Text states made in the trainer."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from starflow import encoders
from starflow.encoders import TextIdentity
from starflow.errors import ConfigError
from training import conditions
from training.conditions import EncodedText


class CountingEncoder:
    """A state is the caption's length, everywhere."""

    width, identity = 3, TextIdentity(name="counting", sha256="0" * 64)

    def __init__(self):
        self.encoded = 0

    def encode(self, captions):
        self.encoded += len(captions)
        return torch.tensor([float(len(caption)) for caption in captions])[:, None, None].expand(-1, 2, 3)


@pytest.fixture
def encoder(monkeypatch):
    encoder = CountingEncoder()
    monkeypatch.setattr(encoders, "load_text_encoder", lambda *_: encoder)
    return encoder


def test_captions_are_encoded_once_and_dropped_ones_are_null(encoder):
    text = EncodedText("counting", (2, 3), "cpu")
    for _ in range(2):
        states, seconds = text(["a", "bb", "ccc", "bb"], None, np.array([False, False, True, False]))
        assert states[:, 0, 0].tolist() == [1, 2, 0, 2]
        assert seconds >= 0
    assert encoder.encoded == 3
    with pytest.raises(ConfigError, match="3 wide, the model expects 4"):
        EncodedText("counting", (2, 4), "cpu")


@pytest.mark.parametrize("left", [b"", bytes(200)])
def test_the_null_state_is_kept_and_made_again_after_a_loss_of_power(encoder, tmp_path, left):
    def null():
        return conditions._null_state(tmp_path, encoder.identity, (2, 3))

    assert np.array_equal(null(), null())
    assert encoder.encoded == 1
    file = next(tmp_path.glob("*.npy"))
    file.write_bytes(left)
    assert null().shape == (2, 3)
    assert encoder.encoded == 2


def test_training_and_validation_ask_at_the_same_time(encoder, monkeypatch):
    monkeypatch.setattr(conditions, "REMEMBERED_CAPTIONS", 2)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    text = EncodedText("counting", (2, 3), "cpu")

    def ask(number):
        captions = ["x" * (1 + (number + i) % 5) for i in range(3)]
        states, _ = text(captions, None, np.zeros(3, bool))
        return states[:, 0, 0].tolist() == [len(caption) for caption in captions]

    try:
        with ThreadPoolExecutor(2) as pool:
            assert all(pool.map(ask, range(400)))
    finally:
        sys.setswitchinterval(interval)
