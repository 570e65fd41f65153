"""Small flows with weights far from the identity, shared by the tests of this folder."""

from __future__ import annotations

import torch

from starflow.model import FlowConfig, STARFlow

TEXT = FlowConfig(64, (1, 1, 2), grid=(4, 4), text_length=3, text_width=8)
PLAIN = FlowConfig(32, (1, 2), channels=2, grid=(4, 4), head_dim=32)
LABELS = FlowConfig(32, (1, 1), channels=2, grid=(4, 4), classes=5, head_dim=32)


def random_flow(config: FlowConfig, seed: int = 0, std: float = 0.1) -> STARFlow:
    """A flow whose every parameter is random, so that no mistake hides behind zeros."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    flow = STARFlow(config)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return flow.eval()


def inputs(config: FlowConfig, batch: int = 2, grid: tuple[int, int] | None = None, seed: int = 1) -> tuple:
    """Latents (B, C, H, W) and a condition that fits `config`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, config.channels, *(grid or config.grid), generator=generator)
    if config.classes:
        return x, torch.randint(config.classes, (batch,), generator=generator)
    if config.text_length:
        return x, torch.randn(batch, config.text_length, config.text_width, generator=generator)
    return x, None
