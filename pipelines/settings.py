"""What a refresh looks at before it asks any server: whether later stages can use the settings."""

from __future__ import annotations

from pipelines.captioners import load_captioner
from pipelines.config import RefreshConfig
from pipelines.filters import build_filters, load_score
from pipelines.sources import list_files
from pipelines.state import RefreshState
from starflow.encoders import find_model
from starflow.errors import ConfigError


def check_settings(state: RefreshState) -> None:
    """Says before the crawl what later stages could not use.

    Raises ConfigError, EncoderError or CaptionError that names the setting.
    """
    config = state.config
    build_filters(config)
    if config.score is not None:
        load_score(config.score)
    _check_latents(state)
    _check_captions(config)
    if config.is_endpoint:
        load_captioner(config)
    if config.ray_address is None:  # else the models may lie where the cluster is
        _check_models(config)


def _check_latents(state: RefreshState) -> None:
    """A snapshot holds latents of one size and VAE, which is compared by name; publishing compares its weights."""
    parent, config = state.parent, state.config
    if parent is None:
        return
    needed = [
        f"{name}={there}"
        for name, there, here in (
            ("image_size", parent.image_size, config.image_size),
            ("vae", parent.vae.name, config.vae),
        )
        if here != there
    ]
    if needed:
        raise ConfigError(
            f"the snapshots of {state.store.url} hold {parent.image_size} px latents of VAE {parent.vae.name}; "
            f"set {' and '.join(needed)}, or use another store"
        )


def _check_captions(config: RefreshConfig) -> None:
    """Without captions every picture would be dropped for a text that is too short, after it has been fetched."""
    if config.captioner != "alt" or not config.min_text or config.source != "list":
        return
    texts = all(file.lower().endswith((".txt", ".txt.gz")) for file in list_files(config.urls))
    if texts or config.caption_column is None:
        raise ConfigError(
            f"{config.urls} has no captions, and min_text={config.min_text} drops what has none; set min_text=0, or "
            "name a captioner"
        )


def _check_models(config: RefreshConfig) -> None:
    if config.vae != "emoji":
        find_model("VAE", config.vae)
    if config.text_encoder not in (None, "minilm"):
        find_model("text encoder", str(config.text_encoder))
    if config.captioner != "alt" and not config.is_endpoint:
        find_model("captioner", config.captioner)
