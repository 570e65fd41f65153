"""Decoders fine-tuned to noisy latents: what sampling needs of them, without the training stack.

A flow learns latents with Gaussian noise, so its samples carry that noise. A decoder that has learned to decode such
latents takes them as they are (STARFlow, arXiv 2506.06276, on the latent space); without one, a step along the flow's
own score removes the noise first. `training/decoder.py` makes them. One is a manifest ``decoders/<name>/decoder.json``,
created last, and a safetensors object with the decoder half of a VAE; the encoder, and so the latents, stay the VAE's.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from starflow import manifest
from starflow.config import Config
from starflow.encoders import DiffusersVAE, VAEIdentity
from starflow.errors import ConfigError, CorruptError, NotFoundError
from starflow.manifest import ObjectRef
from starflow.objectstore import ObjectStore, open_store

KIND, VERSION = "decoder", 1
PREFIX = "decoders/"


class Quality(Config):
    """Held-out pictures, decoded from latents with the noise; decibels of peak signal to noise."""

    pictures: int
    plain: float = Field(description="PSNR of the VAE's own decoder.")
    tuned: float = Field(description="PSNR of the fine-tuned decoder.")
    plain_lpips: float | None = Field(None, description="Perceptual distance, where its weights were given.")
    tuned_lpips: float | None = None


class Decoder(Config):
    """A finished decoder's manifest."""

    name: str
    created: str = Field(description="ISO 8601, UTC.")
    code: str = Field(description="Version of starflow that wrote it.")
    vae: VAEIdentity = Field(description="The VAE whose latents it decodes.")
    latent_noise: float = Field(description="Standard deviation of the noise on the latents it learned to decode.")
    steps: int
    weights: ObjectRef = Field(description="safetensors: the moving average of the decoder's weights, float32.")
    quality: Quality
    config: dict[str, Any] = Field(description="The fine-tuning's configuration.")
    attribution: str | None = Field(None, description="To be shown wherever pictures from it appear.")


def decoder_key(name: str) -> str:
    """Key of the manifest."""
    return f"{PREFIX}{name}/decoder.json"


def list_decoders(store: ObjectStore) -> list[Decoder]:
    """Every finished decoder in the store, oldest first."""
    keys = [info.key for info in store.list(PREFIX) if info.key.endswith("/decoder.json")]
    found = [Decoder.model_validate(manifest.load(store, key, KIND, VERSION)) for key in keys]
    return sorted(found, key=lambda decoder: (decoder.created, decoder.name))


def find_decoder(store: ObjectStore, vae: VAEIdentity, latent_noise: float) -> Decoder | None:
    """The newest decoder in the store for latents of `vae` with just this noise, or None."""
    fitting = [d for d in list_decoders(store) if d.vae.sha256 == vae.sha256 and d.latent_noise == latent_noise]
    return fitting[-1] if fitting else None


def read_decoder(uri: str) -> tuple[ObjectStore, Decoder]:
    """Store and manifest of ``STORE/NAME``. Raises ConfigError for another form, NotFoundError naming what there is."""
    url, _, name = uri.rstrip("/").rpartition("/")
    if not url or not name:
        raise ConfigError(f"decoder {uri!r} is not STORE/NAME, for example s3://starflow/emoji-noisy")
    store = open_store(url)
    try:
        return store, Decoder.model_validate(manifest.load(store, decoder_key(name), KIND, VERSION))
    except NotFoundError as error:
        known = ", ".join(decoder.name for decoder in list_decoders(store)) or "none; see starflow finetune-decoder"
        raise NotFoundError(f"decoder {name!r} is not in {store.url}, which holds: {known}") from error


def check_decoder(decoder: Decoder, vae: VAEIdentity, latent_noise: float) -> None:
    """Raises ConfigError, naming both sides, for a decoder of another VAE or of other noise than a flow's latents."""
    if decoder.vae.sha256 != vae.sha256:
        raise ConfigError(
            f"decoder {decoder.name} belongs to the VAE {decoder.vae.name} ({decoder.vae.sha256[:12]}), the flow to "
            f"{vae.name} ({vae.sha256[:12]}); fine-tune one for it with starflow finetune-decoder"
        )
    if decoder.latent_noise != latent_noise:
        raise ConfigError(
            f"decoder {decoder.name} decodes latents with noise {decoder.latent_noise}, the flow's have noise "
            f"{latent_noise}; fine-tune one with latent_noise={latent_noise}"
        )


def choose_decoder(choice: str, store: ObjectStore, vae: DiffusersVAE, latent_noise: float) -> DiffusersVAE | None:
    """`vae` with the decoder that `choice` names, for latents with this noise; None for none.

    none; ``STORE/NAME``; or auto: the newest in `store` (where the flow lies) for this VAE and noise, if any.
    Raises ConfigError, NotFoundError or CorruptError.
    """
    if choice == "none":
        return None
    if choice != "auto":
        store, decoder = read_decoder(choice)
        check_decoder(decoder, vae.identity, latent_noise)
        return load_decoder(store, decoder, vae)
    found = find_decoder(store, vae.identity, latent_noise)
    return load_decoder(store, found, vae) if found else None


def load_decoder(store: ObjectStore, decoder: Decoder, vae: DiffusersVAE) -> DiffusersVAE:
    """`vae` with the decoder's weights in place of its own. Raises NotFoundError, CorruptError or EncoderError."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        state = load(manifest.get(store, decoder.weights))
    except SafetensorError as error:
        raise CorruptError(f"{store.url}/{decoder.weights.key} is not a safetensors file: {error}") from error
    return vae.with_decoder(state)
