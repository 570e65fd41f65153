"""The architecture of a flow, apart from the model so that reading a configuration loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

#: Rotary angles that encode the text index; the others are shared evenly by row and column.
TEXT_ANGLES = 8


@dataclass(frozen=True)
class FlowConfig:
    """The architecture; two models with equal configs have the same parameters.

    width: model width M.
    layers: transformer layers of each block, data -> noise; the last block is the deep one.
    channels: latent channels C.
    patch: side p of a patch, in latent cells; a token holds C p^2 values.
    grid: nominal latent grid (H, W) in latent cells (not tokens); other grids work, positions are relative to it.
    text_length, text_width: tokens L and width E of the text encoder's states; 0 and 0 without text.
    classes: labels of a class-conditional model (one more embedding, the last, means "no label"); 0 without.
    head_dim: width d of an attention head.
    """

    width: int
    layers: tuple[int, ...]
    channels: int = 4
    patch: int = 1
    grid: tuple[int, int] = (32, 32)
    text_length: int = 0
    text_width: int = 0
    classes: int = 0
    head_dim: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "grid", tuple(self.grid))
        if self.width % self.head_dim or min(self.width, self.head_dim) < 1:
            raise ValueError(f"width {self.width} is not a multiple of head_dim {self.head_dim}")
        if self.head_dim % 4 or self.head_dim <= 2 * TEXT_ANGLES:
            raise ValueError(f"head_dim {self.head_dim} must be a multiple of 4 above {2 * TEXT_ANGLES}")
        if not self.layers or min(self.layers) < 1:
            raise ValueError(f"layers {self.layers} must name at least one block of at least one layer")
        if (self.text_length > 0) != (self.text_width > 0):
            raise ValueError(f"text_length {self.text_length} and text_width {self.text_width}: set both or none")
        if self.text_length and self.classes:
            raise ValueError(f"text_length {self.text_length} and classes {self.classes}: set one of them")
        if self.channels < 1:
            raise ValueError(f"channels {self.channels} must be at least 1")
        self.tokens(*self.grid)

    @classmethod
    def from_released(cls, released: Mapping[str, Any]) -> FlowConfig:
        """Reads the keys of the released architecture files (`img_size`, `channels`, `txt_size`, ...)."""
        return cls(
            width=released["channels"],
            layers=tuple(released["layers"]),
            channels=released.get("in_channels", 4),
            patch=released["patch_size"],
            grid=(released["img_size"], released["img_size"]),
            text_length=released.get("txt_size", 0),
            text_width=released.get("txt_dim", 0) if released.get("txt_size", 0) else 0,
            head_dim=released.get("head_dim", 64),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON types only; `FlowConfig(**config.to_dict()) == config`."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @property
    def token_width(self) -> int:
        """D, the values in one token."""
        return self.channels * self.patch**2

    @property
    def prefix_length(self) -> int:
        """L, the tokens in front of the image in the deep block: text, one label, or none."""
        return 1 if self.classes else self.text_length

    def tokens(self, height: int, width: int) -> tuple[int, int]:
        """Token grid (H/p, W/p) of a latent grid. Raises ValueError when it does not divide."""
        if min(height, width) < 1 or height % self.patch or width % self.patch:
            raise ValueError(f"latent grid {height} x {width} is not divisible by patch {self.patch}")
        return height // self.patch, width // self.patch
