"""What only a GPU can show; run by `make gpu`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from starflow.decoding import BlockDecoder, Steps
from starflow.model import STARFlow
from starflow.presets import PRESETS
from starflow.sampling import sample
from tests.starflow.flows import TEXT, inputs, random_flow

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def test_gpu_and_cpu_agree() -> None:
    flow = random_flow(TEXT)
    x, text = inputs(TEXT)
    expected, drawn = flow(x, text), sample(flow, x, text, text[:1] * 0, 2.0)
    flow = flow.cuda()
    output = flow(x.cuda(), text.cuda())
    torch.testing.assert_close(output.z.cpu(), expected.z, rtol=1e-3, atol=1e-3)
    again = sample(flow, x.cuda(), text.cuda(), text[:1].cuda() * 0, 2.0)
    torch.testing.assert_close(again.cpu(), drawn, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_steps_equal_the_steps_themselves(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequential and Jacobi samples by CUDA graphs, over several buckets and batches, and without graphs."""
    flow = random_flow(replace(TEXT, grid=(8, 8)), std=0.05).cuda().to(dtype)
    noise, text = (x.cuda() for x in inputs(flow.config, batch=3))
    arguments = (flow, noise, text, text[:1] * 0, 2.0)
    monkeypatch.setattr(Steps, "BUCKET", 24)
    recorded = [sample(*arguments) for _ in range(2)]
    jacobi = sample(*arguments, method="jacobi", window=8)
    monkeypatch.setattr(Steps, "_capture", lambda steps, end: None)
    torch.testing.assert_close(recorded[0], recorded[1], rtol=0, atol=0)
    torch.testing.assert_close(recorded[0], sample(*arguments), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(jacobi, sample(*arguments, method="jacobi", window=8), rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(Steps, "FIXED", ())
    limit = 1e-3 if dtype == torch.float32 else 1e-1
    torch.testing.assert_close(recorded[0], sample(*arguments), rtol=limit, atol=limit)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_graphs_are_recorded_on_the_gpu_of_the_flow() -> None:
    """The last GPU, while the first one is current and has recorded before."""
    drawn = []
    for device in ("cuda:0", f"cuda:{torch.cuda.device_count() - 1}"):
        flow = random_flow(TEXT).to(device)
        noise, text = (x.to(device) for x in inputs(TEXT))
        drawn.append(sample(flow, noise, text).cpu())
    torch.testing.assert_close(drawn[1], drawn[0], rtol=1e-4, atol=1e-4)


def test_a_step_is_recorded_once_a_bucket() -> None:
    runs = []
    total = torch.zeros(64, device="cuda")

    def step(place: torch.Tensor, end: int) -> torch.Tensor:
        runs.append(end)
        total[place] = total[place] + end
        return total.sum()

    steps = Steps(step, 600, 4, total.device)
    steps.BUCKET = 256
    with torch.inference_mode():
        sums = [float(steps(start)) for start in (0, 4, 8, 0)]
    assert runs == [256, 256]  # once for itself, once to record it
    assert sums == [1024.0, 2048.0, 3072.0, 4096.0]


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_compiled_bfloat16_training_step(checkpointing: str) -> None:
    flow = random_flow(TEXT).cuda().bfloat16().train()
    flow.checkpointing = checkpointing  # type: ignore[assignment]
    flow.compile_layers()
    x, text = inputs(TEXT, batch=8)
    output = flow(x.cuda(), text.cuda().bfloat16())
    output.loss.backward()
    assert output.z.dtype == torch.float32
    assert all(torch.isfinite(parameter.grad).all() for parameter in flow.parameters())


def test_released_shape_samples_within_24_gib() -> None:
    """256 x 256, batch 8, guided, bfloat16; a few tokens of every block are enough to touch all memory."""
    config = PRESETS["t2i-256"]
    with torch.device("meta"):
        flow = STARFlow(config)
    flow = flow.bfloat16().to_empty(device="cuda").eval()
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        for parameter in flow.parameters():
            parameter.normal_(0, 0.01)
        text = torch.randn(16, 128, 2048, device="cuda", dtype=torch.bfloat16)
        table = flow.rotary((32, 32), text.device, torch.float32)
        for block in flow.blocks:
            sees = block.sees_text
            decoder = BlockDecoder(block, 1024, table, text if sees else None, 8, 2.0 if sees else 0.0)
            sigma, _ = decoder(torch.randn(8, 16, 4, device="cuda"), slice(1008, 1024), 1024)
            assert torch.isfinite(sigma).all()
    assert torch.cuda.max_memory_allocated() < 24 * 2**30
