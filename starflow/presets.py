"""Named architectures: the published sizes and the small ones used by the demo and the tests."""

from __future__ import annotations

from starflow.architecture import FlowConfig
from starflow.errors import ConfigError

#: Latent grids follow from the VAE: downsampling 8 for the published sizes, 2 for the demo's emoji VAE.
PRESETS: dict[str, FlowConfig] = {
    # For tests: a second per training step on any machine is too much.
    "tiny": FlowConfig(64, (1, 1, 2), grid=(8, 8), text_length=6, text_width=24),
    # The demo: 32 x 32 pictures, 16 x 16 latents, 8 x 8 tokens, 16 text tokens of MiniLM.
    "emoji": FlowConfig(192, (2, 2, 6), patch=2, grid=(16, 16), text_length=16, text_width=384),
    # The released text-to-image model, 3.8 B: SD-VAE latents, 128 text tokens of FLAN-T5-XL.
    "t2i-256": FlowConfig(3072, (2, 2, 2, 2, 2, 24), text_length=128, text_width=2048),
    # The same at 512 x 512: a patch of 2, assumed (docs/model.md), keeps 1,024 image tokens.
    "t2i-512": FlowConfig(3072, (2, 2, 2, 2, 2, 24), patch=2, grid=(64, 64), text_length=128, text_width=2048),
    # Class-conditional ImageNet, 1.4 B; patches assumed.
    "imagenet-256": FlowConfig(2048, (2, 2, 2, 2, 2, 18), classes=1000),
    "imagenet-512": FlowConfig(2048, (2, 2, 2, 2, 2, 18), patch=2, grid=(64, 64), classes=1000),
}

#: Aspect ratios (width, height) of the training buckets, all at about the nominal area.
ASPECT_RATIOS = ((1, 1), (3, 2), (2, 3), (4, 3), (3, 4), (16, 9), (9, 16), (21, 9), (9, 21))


def get_preset(name: str) -> FlowConfig:
    """The preset called `name`. Raises ConfigError listing the known ones."""
    if name not in PRESETS:
        raise ConfigError(f"preset {name!r} does not exist; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def aspect_grid(config: FlowConfig, ratio: tuple[int, int]) -> tuple[int, int]:
    """Latent grid (H, W) nearest to the ratio (width, height) at the nominal area, in whole patches."""
    height, width = config.grid
    side = (height * width) ** 0.5 / config.patch
    stretch = (ratio[0] / ratio[1]) ** 0.5
    return max(1, round(side / stretch)) * config.patch, max(1, round(side * stretch)) * config.patch
