"""Commands: train, runs, checkpoints, train-vae."""

from __future__ import annotations

from training.checkpoint_commands import checkpoints
from training.run_commands import runs
from training.train_command import train

__all__ = ["checkpoints", "runs", "train"]
