"""Fine-tunes a VAE's decoder to decode noisy latents: what a flow samples, without a denoising step.

STARFlow (arXiv 2506.06276) trains the flow on latents x + sigma e. The encoder stays; the decoder learns the picture
from such latents by reconstruction (L1 and squared error), LPIPS where its weights are given, and a patch
discriminator whose weight adapts (VQGAN, arXiv 2012.09841). What is kept is a moving average of the weights.

Every draw is a function of (seed, step), so a fine-tuning that was killed goes on from its newest progress to the
same weights, bit for bit on the same kind of machine with the same number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from safetensors.torch import save
from torch import Tensor

from starflow import __version__, manifest
from starflow.cache import FileCache
from starflow.config import Config
from starflow.decoders import KIND, PREFIX, VERSION, Decoder, Quality, decoder_key
from starflow.encoders import DECODER_PREFIXES, DiffusersVAE, load_vae
from starflow.errors import AlreadyExistsError, ConfigError, NotFoundError
from starflow.objectstore import ObjectStore, open_store
from starflow.snapshots import Snapshot, load_snapshot
from training.config import RUN_NAME, default_cache
from training.decoder_loss import PatchDiscriminator, Perceptual, adaptive_weight, hinge, read_perceptual
from training.decoder_pictures import FolderPictures, PictureBatch, Pictures, SnapshotPictures
from training.decoder_state import (
    Progress,
    delete_progress,
    fill_optimizer,
    load_progress,
    optimizer_tensors,
    save_progress,
    with_prefix,
)
from training.vae import decibels, learning_rate, unit

#: The step whose draws the held-out pictures get; no training step has such a number.
HELD_OUT_STEP = 2**40


class DecoderConfig(Config):
    """What `starflow finetune-decoder` does."""

    store: str = Field(description="Object store for the decoder and the snapshot: s3://bucket/prefix or a folder.")
    name: str = Field(pattern=RUN_NAME, description="Name of the decoder; the same name resumes it.")
    snapshot: str = Field(
        "newest", description="Snapshot whose latents and original pictures to learn from, unless images is set."
    )
    images: Path | None = Field(None, description="Folder of pictures to learn from instead, searched recursively.")
    resolution: int = Field(256, gt=0, description="Pictures of a folder are scaled and cropped to this side.")
    vae: str | None = Field(
        None, description="emoji, a Hugging Face id or a folder. Left out: the snapshot's; for a folder, emoji."
    )
    latent_noise: float = Field(
        0.3, ge=0, description="Standard deviation of the noise on the latents: that of the flow it will decode for."
    )
    steps: int = Field(10_000, gt=0, description="Optimizer steps.")
    batch_size: int = Field(32, gt=0, description="Pictures per step.")
    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate; cosine decay after 2 % of warm-up.")
    l1_weight: float = Field(1.0, ge=0, description="Weight of the mean absolute error of the pixels.")
    l2_weight: float = Field(0.5, ge=0, description="Weight of their mean squared error.")
    perceptual_files: tuple[Path, ...] = Field(
        (), description="Files with the weights of VGG-16 and of LPIPS (.pth or .safetensors); none: no such loss."
    )
    perceptual_weight: float = Field(1.0, ge=0, description="Weight of LPIPS.")
    adversarial_weight: float = Field(
        0.1, ge=0, description="Weight of the discriminator, times the adaptive one; 0 leaves it out."
    )
    adversarial_start: int = Field(
        5_000, ge=0, description="Steps before the discriminator has a say; it learns from the first one."
    )
    discriminator_width: int = Field(64, gt=0, multiple_of=8, description="Its channels in the first layer.")
    discriminator_layers: int = Field(3, gt=0, le=6, description="Halvings of the resolution in it.")
    ema_decay: float = Field(0.999, ge=0, lt=1, description="Decay of the weight average that is kept.")
    held_out: float = Field(1 / 64, gt=0, le=1 / 8, description="Share of the pictures that is only measured on.")
    validation_pictures: int = Field(256, gt=0, description="Held-out pictures per measurement, at most.")
    validate_every: int = Field(1000, gt=0, description="Steps between measurements; the last step has one too.")
    checkpoint_every: int = Field(500, gt=0, description="Steps between saves that a killed run goes on from.")
    seed: int = Field(0, ge=0, description="Decides the discriminator's start, the order and every random draw.")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="Of the convolutions in training; weights and measurements are float32."
    )
    device: str = Field("cpu", description="Torch device.")
    cache: Path = Field(default_factory=default_cache, description="Local folder for what can be fetched again.")

    @model_validator(mode="after")
    def _check(self) -> DecoderConfig:
        if not (self.l1_weight or self.l2_weight):
            raise ValueError("l1_weight and l2_weight are both 0; nothing would hold the colours")
        return self


#: Keys that say where things lie on a machine; they are not recorded.
PLACES = {"store", "images", "device", "cache"}
#: Keys that may differ when a fine-tuning goes on; pictures and snapshot are compared by identity.
RESUMABLE = PLACES | {"snapshot", "checkpoint_every", "validate_every"}


@dataclass(frozen=True)
class Losses:
    """Of one step; parts that are off are None."""

    total: float
    reconstruction: float
    perceptual: float | None
    adversarial: float | None
    discriminator: float | None


OnProgress = Callable[[int, Losses, Quality | None], None]


def finetune(config: DecoderConfig, on_progress: OnProgress = lambda step, losses, quality: None) -> Decoder:
    """Fine-tunes, or goes on with it, and commits; a finished decoder of the same configuration is returned as it is.

    Calls `on_progress(step, losses, quality)`, with a quality at measurements. Raises ConfigError for a name that was
    started with another configuration or other pictures, and for a VAE that is not the snapshot's.
    """
    store = open_store(config.store)
    try:
        found = Decoder.model_validate(manifest.load(store, decoder_key(config.name), KIND, VERSION))
    except NotFoundError:
        return _Finetuning(store, config).run(on_progress)
    _check_same(config, found.config)
    delete_progress(store, config.name)  # left by a process that was killed right after the commit
    return found


def _check_same(config: DecoderConfig, theirs: dict[str, Any]) -> None:
    mine = config.model_dump(mode="json")
    for key in sorted(mine.keys() - RESUMABLE):
        # Files may have moved; whether there are any decides.
        same = bool(mine[key]) == bool(theirs[key]) if key == "perceptual_files" else mine[key] == theirs[key]
        if not same:
            raise ConfigError(
                f"decoder {config.name!r} was started with {key}={theirs[key]}, the configuration says "
                f"{key}={mine[key]}; go on with the first, or use another name"
            )


class _Finetuning:
    """The decoder, its average, the discriminator and their optimizers."""

    def __init__(self, store: ObjectStore, config: DecoderConfig) -> None:
        self.store = store
        newest = load_progress(store, config.name)
        if newest is not None:
            _check_same(config, newest[0].config)
            config = config.model_copy(update={"snapshot": newest[0].config["snapshot"]})
        snapshot = None if config.images else load_snapshot(store, config.snapshot)
        # Fixed at the first start: newest may mean another one later.
        self.config = config = config.model_copy(update={"snapshot": snapshot.id} if snapshot else {})
        self.vae = _load_vae(config, snapshot)
        self.pictures = _pictures(store, config, self.vae, snapshot)
        _check_size(config, self.pictures.smallest)
        self.perceptual = None
        if config.perceptual_files:
            self.perceptual = Perceptual(read_perceptual(config.perceptual_files)).to(config.device)
        self._make_networks()
        self.step = self._resume(*newest) if newest is not None else 0

    def _make_networks(self) -> None:
        config = self.config
        self.tuned, self.average = (self.vae.with_decoder(self.vae.decoder_state()) for _ in range(2))
        self.weights, self.averages = (
            [value for name, value in vae.module.named_parameters() if name.startswith(DECODER_PREFIXES)]
            for vae in (self.tuned, self.average)
        )
        for weight in self.weights:
            weight.requires_grad_()
        self.optimizer = torch.optim.AdamW(self.weights, betas=(0.9, 0.99), weight_decay=0.0)
        torch.manual_seed(config.seed)
        self.discriminator = PatchDiscriminator(config.discriminator_width, config.discriminator_layers)
        self.discriminator.to(config.device)
        parameters = self.discriminator.parameters()
        self.critic = torch.optim.AdamW(parameters, config.learning_rate, betas=(0.5, 0.9), weight_decay=0.0)

    def run(self, on_progress: OnProgress) -> Decoder:
        """The steps that are left, then the commit."""
        config, quality = self.config, None
        while self.step < config.steps:
            losses = self._train_step(self.pictures.training(self.step))
            self.step += 1
            last = self.step == config.steps
            quality = self._measure() if last or self.step % config.validate_every == 0 else None
            if self.step % config.checkpoint_every == 0 or last:
                save_progress(
                    self.store, config.name, self.step, self._config(), self.pictures.identity, self._tensors()
                )
            on_progress(self.step, losses, quality)
        return self._commit(quality or self._measure())

    def _train_step(self, batch: PictureBatch) -> Losses:
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, config.steps, config.learning_rate)
        target = unit(batch.pixels).to(config.device)
        with self._autocast():
            decoded = self._decode(self._noisy(batch, self.step)).float()
        pixels = config.l1_weight * F.l1_loss(decoded, target) + config.l2_weight * F.mse_loss(decoded, target)
        with self._autocast():
            perceptual = self.perceptual(decoded, target).float().mean() if self.perceptual else None
        loss = pixels if perceptual is None else pixels + config.perceptual_weight * perceptual
        adversarial = None
        if config.adversarial_weight and self.step >= config.adversarial_start:
            adversarial = self._adversarial(decoded)
            weight = adaptive_weight(loss, adversarial, self.tuned.module.decoder.conv_out.weight)
            loss = loss + config.adversarial_weight * weight * adversarial
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self._average()
        return Losses(
            total=loss.item(),
            reconstruction=pixels.item(),
            perceptual=None if perceptual is None else perceptual.item(),
            adversarial=None if adversarial is None else adversarial.item(),
            discriminator=self._train_discriminator(decoded.detach(), target) if config.adversarial_weight else None,
        )

    def _adversarial(self, decoded: Tensor) -> Tensor:
        """The decoder's share of the game: how real the discriminator finds its pictures, negated. A scalar."""
        self.discriminator.requires_grad_(False)
        with self._autocast():
            return -self.discriminator(decoded).float().mean()

    def _train_discriminator(self, decoded: Tensor, target: Tensor) -> float:
        self.discriminator.requires_grad_(True)
        with self._autocast():
            real, fake = self.discriminator(torch.cat([target, decoded])).float().chunk(2)
        loss = hinge(real, fake)
        self.critic.zero_grad()
        loss.backward()
        self.critic.step()
        return loss.item()

    def _noisy(self, batch: PictureBatch, step: int) -> Tensor:
        """Latents as training draws them for the flow: from the posterior, with the noise. (B, C, h, w) float32."""
        generator = torch.Generator().manual_seed((self.config.seed * 1_000_003 + step) % 2**63)
        posterior, noise = (torch.randn(batch.mean.shape, generator=generator) for _ in range(2))
        return (batch.mean + batch.std * posterior + self.config.latent_noise * noise).to(self.config.device)

    def _decode(self, latents: Tensor) -> Tensor:
        identity = self.vae.identity
        return self.tuned.module.decode(latents / identity.scaling_factor + identity.shift_factor).sample

    def _autocast(self) -> torch.autocast:
        device = torch.device(self.config.device).type
        return torch.autocast(device, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    @torch.no_grad()
    def _average(self) -> None:
        done = self.step + 1
        decay = min(self.config.ema_decay, (1 + done) / (10 + done))  # short memory at first
        for mean, value in zip(self.averages, self.weights, strict=True):
            mean.lerp_(value, 1 - decay)

    @torch.no_grad()
    def _measure(self) -> Quality:
        """Both decoders on the same noisy latents of held-out pictures."""
        values: dict[str, list[Tensor]] = {"plain": [], "tuned": [], "plain_lpips": [], "tuned_lpips": []}
        for number, batch in enumerate(self.pictures.held_out(self.config.validation_pictures)):
            target = unit(batch.pixels).to(self.config.device)
            latents = self._noisy(batch, HELD_OUT_STEP + number)
            for name, vae in (("plain", self.vae), ("tuned", self.average)):
                decoded = vae.decode(latents).clamp(-1, 1)
                values[name].append(decibels(decoded, target))
                if self.perceptual:
                    values[f"{name}_lpips"].append(self.perceptual(decoded, target))
        means = {name: torch.cat(parts).mean().item() for name, parts in values.items() if parts}
        return Quality(pictures=sum(map(len, values["plain"])), **means)

    def _config(self) -> dict[str, Any]:
        return self.config.model_dump(mode="json", exclude=PLACES)

    def _tensors(self) -> dict[str, Tensor]:
        networks = {
            "decoder": self.tuned.decoder_state(),
            "average": self.average.decoder_state(),
            "discriminator": self.discriminator.state_dict(),
        }
        tensors = {f"{prefix}/{name}": value for prefix, state in networks.items() for name, value in state.items()}
        return tensors | optimizer_tensors(self.optimizer, "optimizer") | optimizer_tensors(self.critic, "critic")

    def _resume(self, progress: Progress, tensors: dict[str, Tensor]) -> int:
        if progress.pictures != self.pictures.identity:
            raise ConfigError(
                f"decoder {self.config.name!r} was started with {progress.pictures}, these are "
                f"{self.pictures.identity}; go on with the first, or use another name"
            )
        for vae, prefix in ((self.tuned, "decoder"), (self.average, "average")):
            vae.module.load_state_dict(vae.module.state_dict() | with_prefix(tensors, prefix))
        self.discriminator.load_state_dict(with_prefix(tensors, "discriminator"))
        fill_optimizer(self.optimizer, "optimizer", tensors)
        fill_optimizer(self.critic, "critic", tensors)
        return progress.step

    def _commit(self, quality: Quality) -> Decoder:
        name = self.config.name
        data = save({key: value.cpu().contiguous() for key, value in self.average.decoder_state().items()})
        decoder = Decoder(
            name=name,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            code=__version__,
            vae=self.vae.identity,
            latent_noise=self.config.latent_noise,
            steps=self.config.steps,
            weights=manifest.put(self.store, f"{PREFIX}{name}/weights.safetensors", data),
            quality=quality,
            config=self._config(),
            attribution=self.pictures.attribution,
        )
        try:
            manifest.commit(self.store, decoder_key(name), KIND, VERSION, decoder.model_dump(mode="json"))
        except AlreadyExistsError as error:
            raise AlreadyExistsError(
                f"decoder {name!r} was finished by another process meanwhile; that one stands in {self.store.url}"
            ) from error
        delete_progress(self.store, name)
        return decoder


def _check_size(config: DecoderConfig, side: int) -> None:
    smallest = PatchDiscriminator.smallest(config.discriminator_layers)
    if config.adversarial_weight and side < smallest:
        raise ConfigError(
            f"pictures with a side of {side} pixels are too small for a discriminator of {config.discriminator_layers} "
            f"layers, which needs {smallest}; set discriminator_layers lower, or adversarial_weight=0"
        )
    if config.perceptual_files and side < Perceptual.SMALLEST:
        raise ConfigError(
            f"pictures with a side of {side} pixels are too small for LPIPS, which needs "
            f"{Perceptual.SMALLEST}; leave perceptual_files out"
        )


def _load_vae(config: DecoderConfig, snapshot: Snapshot | None) -> DiffusersVAE:
    vae = load_vae(config.vae or (snapshot.vae.name if snapshot else "emoji"), config.device)
    if snapshot is not None and vae.identity.sha256 != snapshot.vae.sha256:
        raise ConfigError(
            f"VAE {vae.identity.name} has weights {vae.identity.sha256[:12]}, snapshot {snapshot.id} was made by "
            f"{snapshot.vae.name} ({snapshot.vae.sha256[:12]}); name that one with vae"
        )
    return vae


def _pictures(store: ObjectStore, config: DecoderConfig, vae: DiffusersVAE, snapshot: Snapshot | None) -> Pictures:
    if snapshot is not None:
        cache = FileCache(config.cache / "snapshots")
        return SnapshotPictures(store, snapshot, cache, config.held_out, config.batch_size, config.seed)
    assert config.images is not None  # what else there is without a snapshot
    return FolderPictures(
        config.images, config.resolution, config.held_out, vae, config.device, config.batch_size, config.seed
    )
