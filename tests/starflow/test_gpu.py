"""What only a GPU can show; run by `make gpu`."""

from __future__ import annotations

import pytest
import torch

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
    from starflow.decoding import BlockDecoder

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
            sigma, _ = decoder(torch.randn(8, 16, 4, device="cuda"), 1008)
            assert torch.isfinite(sigma).all()
    assert torch.cuda.max_memory_allocated() < 24 * 2**30
