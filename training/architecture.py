"""The model that a configuration asks for, and whether its data and first weights fit: known before anything starts."""

from __future__ import annotations

from starflow.architecture import FlowConfig
from starflow.checkpoints import list_steps, load_manifest, parse_checkpoint
from starflow.errors import ConfigError, NotFoundError
from starflow.objectstore import ObjectStore, open_store
from starflow.presets import get_preset
from starflow.snapshots import Snapshot, load_snapshot
from training.config import TrainConfig

#: What may differ between a flow and the one whose weights it starts from; see training/initial.py.
_MAY_DIFFER = ("grid", "patch")


def check(store: ObjectStore, config: TrainConfig) -> tuple[FlowConfig, Snapshot]:
    """The model and the snapshot of a run. Raises ConfigError or NotFoundError for what cannot be trained.

    The checkpoint that a new run starts from is not needed, and may be gone, once the run has one of its own.
    """
    flow = architecture(config)
    snapshot = load_snapshot(store, config.snapshot)
    check_data(flow, snapshot, config.preset)
    if flow.text_length and config.text_encoder is None:
        raise ConfigError(f"preset {config.preset} reads text; set text_encoder, for example text_encoder=minilm")
    if config.init_from and not list_steps(store, config.run):
        check_initial(flow, config.init_from)
    return flow, snapshot


def check_initial(flow: FlowConfig, checkpoint: str) -> None:
    """Raises ConfigError when there is no such checkpoint, or its architecture is another."""
    url, run, step = parse_checkpoint(checkpoint)
    try:
        theirs = load_manifest(open_store(url), run, step).flow
    except NotFoundError as error:
        raise ConfigError(f"cannot start from {checkpoint}: {error}") from error
    mine, others = flow.to_dict(), theirs.to_dict()
    for key in mine:
        if key not in _MAY_DIFFER and mine[key] != others[key]:
            raise ConfigError(
                f"{checkpoint} has {key} {others[key]}, the model to be trained {mine[key]}; only patch and grid may "
                f"differ: set model.{key}, or start without it"
            )


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
