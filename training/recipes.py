"""Training recipes: the defaults that belong to a preset. A configuration file overrides any of them."""

from __future__ import annotations

from typing import Any

_RELEASED: dict[str, Any] = {
    # The released 256 x 256 text-to-image model (arXiv 2506.06276 and the shipped configuration); steps and warm-up
    # are assumed.
    "global_batch_size": 1024,
    "steps": 500_000,
    "learning_rate": 6.4e-5,
    "final_learning_rate": 1e-6,
    "warmup_steps": 2000,
    "betas": (0.9, 0.95),
    "weight_decay": 1e-4,
    "latent_noise": 0.3,
    "caption_dropout": 0.1,
    "regularization": 1e-4,
    "precision": "bfloat16",
    "text_encoder": "google/flan-t5-xl",
    "checkpointing": "selective",
    "sample_every": 5000,
}

_IMAGENET: dict[str, Any] = {**_RELEASED, "text_encoder": None, "learning_rate": 1e-4}
_CONTINUED: dict[str, Any] = {"steps": 100_000, "learning_rate": 2e-5, "micro_batch_size": 1}

RECIPES: dict[str, dict[str, Any]] = {
    "tiny": {"global_batch_size": 8, "steps": 20, "learning_rate": 1e-3, "latent_noise": 0.1, "ema_decay": 0.9},
    # Minutes on a CPU; the noise is a fifth of the latents' standard deviation. See docs/emoji-preset.md.
    "emoji": {
        "global_batch_size": 32,
        "steps": 1500,
        "learning_rate": 1.5e-3,
        "final_learning_rate": 1e-5,
        "warmup_steps": 20,
        "latent_noise": 0.2,
        "ema_decay": 0.99,
        "checkpoint_every": 150,
        "validation_every": 100,
        "validation_samples": 64,
        "sample_every": 250,
        "held_out": 0.03,
        "text_encoder": "minilm",
    },
    "t2i-256": _RELEASED,
    # What differs from it is assumed (docs/model.md). Those at 512 are to continue from 256 (`init_from`).
    "t2i-512": {**_RELEASED, **_CONTINUED},
    "imagenet-256": _IMAGENET,
    "imagenet-512": {**_IMAGENET, **_CONTINUED},
}
