"""The model that a configuration asks for, and whether a snapshot fits it: known before anything starts."""

from __future__ import annotations

from starflow.architecture import FlowConfig
from starflow.errors import ConfigError
from starflow.presets import get_preset
from starflow.snapshots import Snapshot
from training.config import TrainConfig


def architecture(config: TrainConfig) -> FlowConfig:
    """The preset's architecture with the configured changes. Raises ConfigError."""
    fields = get_preset(config.preset).to_dict()
    for key in config.model:
        if key not in fields:
            raise ConfigError(f"model.{key} is not an architecture field; choose one of {', '.join(fields)}")
    try:
        return FlowConfig(**{**fields, **config.model})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model {config.model}: {error}") from error


def check_data(flow: FlowConfig, snapshot: Snapshot, preset: str) -> None:
    """Raises ConfigError naming both sides when the snapshot's latents do not fit the model."""
    if snapshot.vae.channels != flow.channels:
        raise ConfigError(
            f"snapshot {snapshot.id} has latents of {snapshot.vae.channels} channels (VAE {snapshot.vae.name}), "
            f"preset {preset} expects {flow.channels}; choose another, or set model.channels={snapshot.vae.channels}"
        )
    for part in snapshot.parts:
        try:
            flow.tokens(*part.grid)
        except ValueError as error:
            raise ConfigError(f"snapshot {snapshot.id} does not fit preset {preset}: {error}") from error
