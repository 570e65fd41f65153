"""Pictures in, pictures out: a trained flow with the encoders it was trained with.

generator = Generator.from_checkpoint("s3://starflow", "emoji")
pictures = generator.sample(["a red heart", "a cat"], guidance=2.0, seed=0)
scores = generator.score(pictures, ["a red heart", "a cat"])
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from starflow import likelihood
from starflow.checkpoints import TrainedInfo, load_checkpoint, parse_checkpoint
from starflow.convert import build, read_model
from starflow.decoders import choose_decoder
from starflow.decoding import Jacobi, Progress
from starflow.encoders import VAE, TextEncoder, load_text_encoder, load_vae, to_pixels, to_tensor
from starflow.errors import ConfigError
from starflow.images import fit
from starflow.model import STARFlow
from starflow.objectstore import open_store
from starflow.presets import ASPECT_RATIOS, aspect_grid
from starflow.sampling import Method, denoise, draw_noise, sample

Grid = tuple[int, int]


@dataclass(frozen=True)
class ImageScore:
    """Exact log-densities of one picture's (noised) latents, in nats unless said otherwise."""

    caption: str
    #: log p(picture | caption)
    nats: float
    #: log p(picture | null caption)
    nats_without_caption: float
    #: their difference: how much the caption says about the picture
    explained: float
    #: -log2 p(picture | caption) per latent value
    bits_per_dim: float
    #: (H/p, W/p) nats of each token, and the caption's share of them
    per_token: np.ndarray
    per_token_explained: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """The numbers, without the maps."""
        names = ("caption", "nats", "nats_without_caption", "explained", "bits_per_dim")
        return {name: getattr(self, name) for name in names}


@dataclass
class Generator:
    """A flow, its VAE and its text encoder (None for a class-conditional or unconditional flow).

    latent_noise: standard deviation of the noise that training added to latents.
    decoder: the VAE with a decoder fine-tuned to latents with that noise, if there is one (starflow.decoders).
    batch_size: pictures that run together.
    """

    model: STARFlow
    vae: VAE
    text_encoder: TextEncoder | None
    latent_noise: float
    trained: TrainedInfo | None = None
    decoder: VAE | None = None
    batch_size: int = 16

    @classmethod
    def from_checkpoint(
        cls,
        store: str,
        run: str,
        step: int | Literal["newest"] = "newest",
        ema: bool = True,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        decoder: str = "auto",
    ) -> Generator:
        """Loads a training checkpoint. Raises NotFoundError, CorruptError, EncoderError.

        decoder: see `starflow.decoders.choose_decoder`; auto looks into `store`.
        """
        config, state, trained = load_checkpoint(open_store(store), run, step, ema)
        model = build(config, state.items(), device, dtype)
        vae, text, noise = trained.vae.name, trained.text_encoder, trained.latent_noise
        return cls._assemble(model, vae, text, noise, device, trained, (decoder, store))

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        vae: str = "stabilityai/sd-vae-ft-ema",
        text_encoder: str | None = "google/flan-t5-xl",
        latent_noise: float = 0.3,
        decoder: str = "auto",
    ) -> Generator:
        """Loads a folder written by `starflow import` or by exporting a checkpoint.

        An exported checkpoint names its encoders; `vae`, `text_encoder` and `latent_noise` (defaults: the
        released recipe) are for imported weights, which do not. decoder: as in `from_checkpoint`; auto looks
        into `folder`.
        """
        config, tensors = read_model(folder)
        described = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("trained")
        trained = TrainedInfo.model_validate(described) if described else None
        model = build(config, tensors, device, dtype)
        if trained is not None:
            vae, text_encoder, latent_noise = trained.vae.name, trained.text_encoder, trained.latent_noise
        return cls._assemble(model, vae, text_encoder, latent_noise, device, trained, (decoder, str(folder)))

    @classmethod
    def open(
        cls, checkpoint: str, device: str = "cpu", dtype: torch.dtype = torch.float32, decoder: str = "auto"
    ) -> Generator:
        """Loads `STORE/RUN`, `STORE/RUN@STEP` or a model folder. Raises ConfigError for another form."""
        if (Path(checkpoint) / "config.json").is_file():
            return cls.from_folder(Path(checkpoint), device, dtype, decoder=decoder)
        store, run, step = parse_checkpoint(checkpoint)
        return cls.from_checkpoint(store, run, step, device=device, dtype=dtype, decoder=decoder)

    @classmethod
    def _assemble(
        cls,
        model: STARFlow,
        vae: str,
        text: str | None,
        noise: float,
        device: str,
        trained: TrainedInfo | None,
        decoder: tuple[str, str],
    ) -> Generator:
        config = model.config
        encoder = None
        if config.text_length:
            if text is None:
                raise ConfigError(f"the flow reads {config.text_length} text tokens but no text encoder is named")
            encoder = load_text_encoder(text, config.text_length, device)
            if encoder.width != config.text_width:
                raise ConfigError(f"text encoder {text} is {encoder.width} wide, the flow reads {config.text_width}")
        loaded = load_vae(vae, device)
        if trained is not None and trained.vae.sha256 != loaded.identity.sha256:
            raise ConfigError(
                f"VAE {vae} has weights {loaded.identity.sha256[:12]}, the flow was trained with "
                f"{trained.vae.sha256[:12]}; use the VAE of that snapshot"
            )
        choice, store = decoder
        return cls(model, loaded, encoder, noise, trained, choose_decoder(choice, open_store(store), loaded, noise))

    @cached_property
    def device(self) -> torch.device:
        """Where the flow runs."""
        return next(self.model.parameters()).device

    def condition(self, prompts: Sequence[str]) -> Tensor | None:
        """Text states (B, L, E); labels (B,) when prompts are class numbers; None without conditioning.

        "" is the null caption, and "no label" of a class-conditional flow.
        """
        config = self.model.config
        if self.text_encoder is not None:
            return self.text_encoder.encode(list(prompts)).to(self.device)
        if not config.classes:
            return None
        labels = [config.classes if prompt == "" else _label(prompt, config.classes) for prompt in prompts]
        return torch.tensor(labels, device=self.device)

    def sample(
        self,
        prompts: Sequence[str],
        guidance: float = 2.0,
        seed: int = 0,
        grid: Grid | None = None,
        method: Method = "jacobi",
        denoise: bool = True,
        tolerance: float = 1e-3,
        progress: Progress = lambda tokens: None,
    ) -> list[Image.Image]:
        """One picture a prompt; picture i depends on (seed, i, prompt) alone, not on the batch.

        grid: latent grid (H, W), the nominal one if None. denoise: remove the noise that the flow learned with
        the latents: by the fine-tuned decoder where there is one, else by the flow's own score. progress: called
        with tokens finished, see `tokens`.
        """
        tuned = denoise and self.decoder is not None
        clean = denoise and not tuned
        latents = self.sample_latents(prompts, guidance, seed, grid, method, clean, tolerance, progress)
        return self.pictures(latents, noisy=tuned)

    def sample_latents(
        self,
        prompts: Sequence[str],
        guidance: float = 2.0,
        seed: int = 0,
        grid: Grid | None = None,
        method: Method = "jacobi",
        clean: bool = True,
        tolerance: float = 1e-3,
        progress: Progress = lambda tokens: None,
    ) -> Tensor:
        """As `sample`, but latents (B, C, H, W). clean: take a step along the flow's score, which removes the noise."""
        config = self.model.config
        guidance = guidance if config.prefix_length else 0.0
        shape = (config.channels, *(grid or config.grid))
        latents = []
        for first in range(0, len(prompts), self.batch_size):
            chunk = prompts[first : first + self.batch_size]
            noise = torch.stack([draw_noise(seed, first + i, shape) for i in range(len(chunk))]).to(self.device)
            text, null = self.condition(chunk), self.condition([""])
            x = sample(self.model, noise, text, null, guidance, method, tolerance, progress=progress)
            latents.append(denoise(self.model, x, text, self.latent_noise) if clean and self.latent_noise else x)
        return torch.cat(latents)

    def tokens(self, pictures: int, grid: Grid | None = None) -> int:
        """Tokens that sampling so many pictures reports to `progress`."""
        return self.batch_tokens(grid) * -(-pictures // self.batch_size)

    def batch_tokens(self, grid: Grid | None = None) -> int:
        """Tokens that decoding one batch of any size reports to `progress`."""
        height, width = self.model.config.tokens(*(grid or self.model.config.grid))
        return height * width * len(self.model.blocks)

    def pictures(self, latents: Tensor, noisy: bool = False) -> list[Image.Image]:
        """Decodes latents (B, C, H, W). noisy: they carry the flow's noise; a fine-tuned decoder, if any, takes it."""
        vae = self.decoder if noisy and self.decoder is not None else self.vae
        chunks = [vae.decode(chunk) for chunk in latents.split(self.batch_size)]
        return [Image.fromarray(pixels) for chunk in chunks for pixels in to_pixels(chunk)]

    def grid_of(self, image: Image.Image) -> Grid:
        """Latent grid of the bucket whose aspect ratio is nearest to the picture's."""
        ratio = image.width / image.height
        nearest = min(ASPECT_RATIOS, key=lambda r: abs(np.log(r[0] / r[1] / ratio)))
        return aspect_grid(self.model.config, nearest)

    def latents(self, images: Sequence[Image.Image], seed: int | None = 0, grid: Grid | None = None) -> Tensor:
        """Encodes pictures, scaled and cropped to one grid, to latents (B, C, H, W) as training saw them.

        seed: of the training noise that is added (picture i gets the same noise whatever the batch); None
        adds none. grid: the first picture's bucket if None.
        """
        height, width = grid or self.grid_of(images[0])
        scale = self.vae.downsampling
        pixels = np.stack([fit(image, height * scale, width * scale) for image in images])
        chunks = [self.vae.encode(chunk.to(self.device))[0] for chunk in to_tensor(pixels).split(self.batch_size)]
        x = torch.cat(chunks)
        if seed is None or not self.latent_noise:
            return x
        shape = (x.shape[1], height, width)
        noise = torch.stack([draw_noise(seed, i, shape) for i in range(len(x))])
        return x + self.latent_noise * noise.to(x)

    def score(self, images: Sequence[Image.Image], captions: Sequence[str], seed: int = 0) -> list[ImageScore]:
        """Exact log-likelihood of each picture given its caption, and without it.

        The density is that of latents with the training noise, drawn from `seed`: clean latents would lie off
        the distribution that the flow has learned. Pictures may have different shapes.
        """
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} images and {len(captions)} captions; give one caption an image")
        scores = []
        for image, caption in zip(images, captions, strict=True):
            x = self.latents([image], seed)
            given = likelihood.score(self.model, x, self.condition([caption]))
            alone = likelihood.score(self.model, x, self.condition([""]))
            scores.append(
                ImageScore(
                    caption=caption,
                    nats=float(given.nats),
                    nats_without_caption=float(alone.nats),
                    explained=float(given.nats - alone.nats),
                    bits_per_dim=float(given.bits_per_dim),
                    per_token=given.per_token[0].cpu().numpy(),
                    per_token_explained=(given.per_token - alone.per_token)[0].cpu().numpy(),
                )
            )
        return scores

    def interpolate(
        self,
        images: tuple[Image.Image, Image.Image],
        captions: tuple[str, str],
        steps: int,
        progress: Progress = lambda tokens: None,
    ) -> list[Image.Image]:
        """`steps` pictures, one batch, from one image to the other, along the arc between their noises."""
        x = self.latents(images, seed=None)
        path = likelihood.interpolate(self.model, x, self.condition(captions), steps, Jacobi(), progress)
        return self.pictures(path)

    def inpaint(
        self,
        image: Image.Image,
        mask: Image.Image,
        caption: str = "",
        rounds: int = 8,
        seed: int = 0,
        progress: Progress = lambda tokens: None,
    ) -> Image.Image:
        """Fills the white part of `mask` (scaled to the picture); a patch is filled if any of it is white.

        Each round is one batch to `progress`.
        """
        x = self.latents([image], seed=seed)
        height, width = self.model.config.tokens(*x.shape[2:])
        grey = mask.convert("L").resize((x.shape[3] * self.vae.downsampling, x.shape[2] * self.vae.downsampling))
        white = torch.from_numpy(np.asarray(grey) > 127)[None, None].float()
        cells = torch.nn.functional.adaptive_max_pool2d(white, (height, width)) > 0
        patch = self.model.config.patch
        cells = cells.repeat_interleave(patch, 2).repeat_interleave(patch, 3).to(self.device)
        text = self.condition([caption])
        filled = likelihood.inpaint(self.model, x, cells, text, rounds, seed, Jacobi(), progress)
        if self.latent_noise:
            filled = denoise(self.model, filled, text, self.latent_noise)
        clean = self.latents([image], seed=None)
        return self.pictures(torch.where(cells, filled, clean))[0]


def _label(prompt: str, classes: int) -> int:
    if not prompt.isdecimal() or int(prompt) >= classes:
        raise ConfigError(f"prompt {prompt!r}: this flow is class-conditional, give a number from 0 to {classes - 1}")
    return int(prompt)


def heat_map(values: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """A per-token map as a picture of `size` (width, height), dark to bright, each map on its own scale."""
    from matplotlib import colormaps

    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / max(high - low, 1e-12)
    pixels = (colormaps["viridis"](scaled)[..., :3] * 255).astype(np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)
