"""Progress of a fine-tuning that another release has written."""

from __future__ import annotations

import json

import pytest
import torch

from starflow.errors import StoreError
from starflow.objectstore import open_store
from training.decoder_state import list_progress, load_progress, save_progress


def test_progress_of_another_release_is_neither_damaged_nor_deleted(tmp_path):
    store = open_store(str(tmp_path))
    for step in (2, 4):
        save_progress(store, "d", step, {}, "pictures", {"weights": torch.zeros(3)})
    newest, _ = both = list_progress(store, "d")
    store.write(newest, json.dumps(json.loads(store.read(newest)) | {"spin": 1}).encode())
    with pytest.raises(StoreError, match=r"000000004\.json has fields that this release does not read \(spin\)"):
        load_progress(store, "d")
    assert list_progress(store, "d") == both
