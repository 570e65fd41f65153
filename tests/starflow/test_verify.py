"""Parity with the numbers of the released architecture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from starflow.convert import WeightsError
from starflow.verify import LIMIT, relative_error, verify

VECTORS = Path(__file__).parent.parent / "vectors"
NAMES = ["tiny_square", "tiny_wide"]


@pytest.mark.parametrize("name", NAMES)
def test_every_quantity_agrees(name: str) -> None:
    errors = verify(VECTORS / name)
    blocks = len(json.loads((VECTORS / f"{name}.json").read_text())["layers"])
    expected = {"z", "loss", "x_grad", "denoised", "sample_unguided", "sample_guided", "sample_guided_jacobi"}
    expected |= {"inverse_of_forward"} | {f"logdet.{k}" for k in range(blocks)}
    assert errors.keys() == expected | {f"block_output.{k}" for k in range(blocks + 1)}
    assert max(errors.values()) < LIMIT / 5


def copy(tmp_path: Path) -> Path:
    for suffix in (".json", ".checkpoint.pth", ".vectors.safetensors"):
        (tmp_path / f"v{suffix}").write_bytes((VECTORS / f"tiny_wide{suffix}").read_bytes())
    return tmp_path / "v"


def test_a_wrong_number_is_found(tmp_path: Path) -> None:
    prefix = copy(tmp_path)
    vectors = load_file(f"{prefix}.vectors.safetensors")
    vectors["sample_guided"] = vectors["sample_guided"] * 1.001
    save_file(vectors, f"{prefix}.vectors.safetensors")
    wrong = [name for name, error in verify(prefix).items() if error > LIMIT]
    assert wrong == ["sample_guided"]


def test_missing_quantities_and_files_are_named(tmp_path: Path) -> None:
    prefix = copy(tmp_path)
    vectors = load_file(f"{prefix}.vectors.safetensors")
    save_file({key: value for key, value in vectors.items() if key != "z"}, f"{prefix}.vectors.safetensors")
    with pytest.raises(WeightsError, match="'z'"):
        verify(prefix)
    with pytest.raises(WeightsError, match=r"nothing\.json"):
        verify(tmp_path / "nothing")


def test_relative_error_never_hides_nan() -> None:
    one = torch.ones(2)
    assert relative_error(one, one) == 0
    assert relative_error(torch.tensor([1.0, torch.nan]), one) == float("inf")
    assert relative_error(torch.ones(3), one) == float("inf")
