"""What decides a training run: one frozen model, from which the DeepSpeed dictionary is generated."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from starflow.cache import FileCache
from starflow.config import Config
from training.recipes import RECIPES

#: Run names become object keys, folder names and rendezvous ids.
RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"


def default_cache() -> Path:
    """Where a machine keeps what it can fetch again: snapshot shards, local logs, resume downloads."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "starflow"


class TrainConfig(Config):
    """A training run. `preset` fills what is left out with its recipe; see training/recipes.py."""

    store: str = Field(description="Object store with the snapshot and the run: s3://bucket/prefix or a folder.")
    run: str = Field(pattern=RUN_NAME, description="Name of the run; the same name resumes it.")
    snapshot: str = Field("newest", description="Snapshot id, or newest. A run stays on the one it was started with.")
    preset: str = Field("emoji", description="Architecture and recipe to start from.")
    model: dict[str, Any] = Field({}, description="Architecture fields that differ from the preset's.")
    steps: int = Field(gt=0, description="Optimizer steps of the whole run.")
    global_batch_size: int = Field(gt=0, description="Samples per step over all ranks.")
    micro_batch_size: int | None = Field(
        None, gt=0, description="Samples per rank and backward pass; more passes accumulate. All at once if left out."
    )
    ranks: int = Field(1, gt=0, description="Processes in all, one per GPU.")
    seed: int = Field(0, ge=0, description="Decides initial weights, sample order and every random draw.")
    order_block: int = Field(
        256, gt=0, description="Neighbouring samples that are read together; with a small cache about a shard's rows."
    )
    order_window: int = Field(
        64, gt=0, description="Blocks whose samples are shuffled together; shards of two windows must fit the cache."
    )

    init_from: str | None = Field(
        None, description="Checkpoint whose weights a new run starts from: STORE/RUN or STORE/RUN@STEP."
    )

    zero_stage: Literal[0, 1, 2, 3] = Field(2, description="What ranks share: 1 optimizer, 2 gradients, 3 weights too.")
    offload: Literal["none", "cpu", "nvme"] = Field(
        "none",
        description="Where masters and moments live: the device, the CPU's memory, or a disk. ZeRO-3 weights: the CPU.",
    )
    nvme_path: Path | None = Field(None, description="Folder on a fast local disk, for offload: nvme.")
    precision: Literal["float32", "autocast", "bfloat16"] = Field(
        "autocast", description="autocast: float32 weights, bfloat16 products; bfloat16: weights too, float32 masters."
    )
    compile: bool = Field(False, description="Compile the model with torch.compile; costs a minute at the start.")
    checkpointing: Literal["none", "selective", "full"] = Field(
        "none", description="Activations recomputed in the backward pass: none, all but matrix products, or all."
    )

    learning_rate: float = Field(gt=0, description="Peak learning rate.")
    final_learning_rate: float = Field(1e-6, ge=0, description="Learning rate at the last step.")
    schedule: Literal["cosine", "warmup-stable-decay"] = Field("cosine", description="Shape after the warm-up.")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    decay_steps: int | None = Field(None, gt=0, description="Last steps that decay, for warmup-stable-decay; a tenth.")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's decay rates of the two moments.")
    weight_decay: float = Field(1e-4, ge=0, description="Decoupled weight decay of matrices; none on the rest.")
    clip: float = Field(1.0, gt=0, description="Largest gradient norm; longer gradients are scaled to it.")
    ema_decay: float = Field(0.9999, ge=0, lt=1, description="Decay of the weight average kept for sampling.")

    latent_noise: float = Field(0.3, ge=0, description="Standard deviation of the noise added to latents.")
    regularization: float = Field(0.0, ge=0, description="Weight of the mean square of block inputs in the loss.")
    resample: bool = Field(True, description="Draw latents from the VAE posterior instead of taking its mean.")
    caption_dropout: float = Field(0.1, ge=0, le=1, description="Share of captions replaced by the null caption.")
    text_encoder: str | None = Field(None, description="minilm, a Hugging Face id or a path; none for no text.")

    checkpoint_every: int = Field(1000, gt=0, description="Steps between checkpoints; the last step has one too.")
    keep_newest: int = Field(3, gt=0, description="Newest checkpoints that stay.")
    keep_every: int | None = Field(
        None, gt=0, description="Checkpoints whose step is a multiple of this stay for good."
    )
    save_timeout: float = Field(1800.0, gt=0, description="Seconds after which an unfinished save has failed.")
    max_failed_saves: int = Field(3, gt=0, description="Saves that may fail in a row before the run stops.")
    held_out: float = Field(
        1 / 64, ge=0, le=1 / 8, description="Fraction of the samples, by hash of their id, that is only validated on."
    )
    validation_every: int = Field(1000, gt=0, description="Steps between validations; the last step has one too.")
    validation_samples: int = Field(256, gt=0, description="Held-out samples per validation, at most.")

    sample_every: int | None = Field(
        None, gt=0, description="Steps between grids of pictures for held-out captions; none if left out."
    )
    sample_count: int = Field(16, gt=0, le=256, description="Pictures in a grid.")

    max_skipped: int = Field(
        10, gt=0, description="Batches in a row with a non-finite loss or a spike before it stops."
    )
    spike_factor: float = Field(20.0, gt=1, description="A gradient norm this many times the usual one is skipped.")
    max_restarts: int = Field(3, ge=0, description="Relaunches without a newly committed step before giving up.")
    hang_timeout: float = Field(600.0, gt=0, description="Seconds without a heartbeat after which a rank is hung.")
    lease_seconds: float = Field(30.0, gt=0, description="How long a silent writer still owns the run.")

    peak_tflops: float | None = Field(None, gt=0, description="TFLOP/s of one rank's device, for the share of peak.")
    wandb_project: str | None = Field(None, description="Also log to this Weights & Biases project.")
    cache: Path = Field(default_factory=default_cache, description="Local folder for what can be fetched again.")
    cache_gib: float = Field(64.0, gt=0, description="GiB that fetched shards may take there; less on a full disk.")

    @model_validator(mode="before")
    @classmethod
    def _fill_from_recipe(cls, data: Any) -> Any:
        preset = data.get("preset", cls.model_fields["preset"].default) if isinstance(data, dict) else None
        if not isinstance(preset, str):
            return data  # the field's own check names it
        if preset not in RECIPES:
            raise ValueError(f"preset {preset!r} does not exist; choose one of {', '.join(RECIPES)}")
        return {**RECIPES[preset], **data}

    @field_validator("snapshot", mode="before")
    @classmethod
    def _number_as_text(cls, snapshot: Any) -> Any:
        return str(snapshot) if type(snapshot) is int else snapshot

    @field_validator("store")
    @classmethod
    def _absolute_store(cls, store: str) -> str:
        return store if "://" in store else str(Path(store).expanduser().absolute())

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.global_batch_size % self.ranks:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} does not divide over ranks {self.ranks}; change one"
            )
        if self.per_rank % self.micro:
            raise ValueError(f"micro_batch_size {self.micro} does not divide {self.per_rank} samples per rank")
        if self.offload == "nvme" and self.nvme_path is None:
            raise ValueError("offload nvme needs nvme_path, a folder on a fast local disk")
        if self.offload != "none" and self.zero_stage == 0:
            raise ValueError(f"offload {self.offload} needs zero_stage 1, 2 or 3")
        if self.zero_stage == 0 and self.precision == "bfloat16":
            raise ValueError("precision bfloat16 keeps float32 masters in ZeRO; use zero_stage 1, or autocast")
        return self

    @property
    def per_rank(self) -> int:
        """Samples per rank and step."""
        return self.global_batch_size // self.ranks

    @property
    def micro(self) -> int:
        """Samples per rank and backward pass."""
        return self.micro_batch_size or self.per_rank

    @property
    def accumulation(self) -> int:
        """Backward passes per step."""
        return self.per_rank // self.micro

    @property
    def folder(self) -> Path:
        """This machine's folder for the run: logs and heartbeats, nothing that a resume needs."""
        return self.cache / "runs" / self.run

    @property
    def shard_cache(self) -> FileCache:
        """This machine's shards of snapshots."""
        return FileCache(self.cache / "snapshots", round(self.cache_gib * 2**30))


#: Keys that may differ between a run's resumed parts: they change speed and bookkeeping, not the mathematics.
RESUMABLE = frozenset(
    {
        "store",
        "ranks",
        "micro_batch_size",
        "zero_stage",
        "offload",
        "nvme_path",
        "compile",
        "checkpointing",
        "steps",
        "checkpoint_every",
        "keep_newest",
        "keep_every",
        "save_timeout",
        "max_failed_saves",
        "validation_every",
        "validation_samples",
        "sample_every",
        "sample_count",
        "max_skipped",
        "spike_factor",
        "max_restarts",
        "hang_timeout",
        "lease_seconds",
        "peak_tflops",
        "wandb_project",
        "cache",
        "cache_gib",
    }
)
