"""Comparison with reference vectors: numbers that the released architecture produced from random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from starflow.convert import WeightsError, load_released
from starflow.decoding import invert
from starflow.model import FlowConfig, STARFlow
from starflow.sampling import denoise, sample

#: Largest relative error accepted: max |ours - reference| / max |reference|.
LIMIT = 1e-4
#: Tight enough that Jacobi iteration reaches the sequential answer to rounding.
JACOBI_TOLERANCE = 1e-12


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """max |ours - reference| / max |reference|; infinite for another number of values or for NaNs."""
    if ours.numel() != reference.numel():
        return float("inf")
    reference = reference.double().flatten()
    error = (ours.double().flatten() - reference).abs().max() / reference.abs().max().clamp(min=1e-12)
    return float(error) if torch.isfinite(error) else float("inf")


def verify(prefix: str | Path) -> dict[str, float]:
    """Relative error of every quantity of `PREFIX.{json,checkpoint.pth,vectors.safetensors}`.

    Raises WeightsError for a missing or unusable file.
    """
    released, vectors = _read(Path(f"{prefix}.json"), Path(f"{prefix}.vectors.safetensors"))
    model = load_released(f"{prefix}.checkpoint.pth", FlowConfig.from_released(released))
    try:
        return {**_forward_errors(model, vectors), **_sample_errors(model, vectors, released)}
    except KeyError as error:
        raise WeightsError(f"{prefix}: the vectors or the architecture lack {error}") from error


def _read(architecture: Path, vectors: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return json.loads(architecture.read_text(encoding="utf-8")), load_file(vectors)
    except (OSError, ValueError, SafetensorError) as error:
        raise WeightsError(
            f"cannot read {architecture} and {vectors}: {error}; give the common beginning of such files, for example "
            "tests/vectors/tiny_square"
        ) from error


def _forward_errors(model: STARFlow, vectors: dict[str, Tensor]) -> dict[str, float]:
    x, text = vectors["x"].clone().requires_grad_(), vectors.get("y")
    output = model(x, text)
    (gradient,) = torch.autograd.grad(output.loss, x)
    ours = {"z": output.z, "loss": output.loss, "x_grad": gradient}
    ours |= {f"logdet.{k}": logdet for k, logdet in enumerate(output.logdets)}
    ours |= {f"block_output.{k}": state for k, state in enumerate(output.states)}
    return {name: relative_error(tensor.detach(), vectors[name]) for name, tensor in ours.items()}


def _sample_errors(model: STARFlow, vectors: dict[str, Tensor], released: dict[str, Any]) -> dict[str, float]:
    x, text, noise, null = vectors["x"], vectors.get("y"), vectors["noise"], vectors.get("y_null")
    w = released["guidance"]
    ours = {
        "denoised": denoise(model, x, text, released["noise_std"]),
        "sample_unguided": sample(model, noise, text),
        "sample_guided": sample(model, noise, text, null, w),
        "sample_guided_jacobi": sample(model, noise, text, null, w, method="jacobi", tolerance=JACOBI_TOLERANCE),
    }
    errors = {name: relative_error(tensor, vectors[name]) for name, tensor in ours.items() if name in vectors}
    with torch.inference_mode():
        back = invert(model, model(x, text).z, text).x
    return {**errors, "inverse_of_forward": relative_error(back, x)}
