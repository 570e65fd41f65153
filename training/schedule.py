"""Learning rate as a pure function of the step, so that there is no scheduler state to save."""

from __future__ import annotations

import math

from training.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of `step` (0-based): linear warm-up, then cosine or constant-then-linear decay.

    Cosine follows SGDR without restarts (arXiv 1608.03983), the other shape is warmup-stable-decay
    (arXiv 2404.06395). Both end at `final_learning_rate`, which the last step uses.
    """
    peak, final = config.learning_rate, config.final_learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.schedule == "cosine":
        begin = config.warmup_steps
    else:
        begin = max(config.steps - (config.decay_steps or max(1, config.steps // 10)), config.warmup_steps)
    length = config.steps - 1 - begin
    done = min(max((step - begin) / length, 0.0), 1.0) if length > 0 else float(step >= config.steps - 1)
    if config.schedule == "cosine":
        return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * done))
    return peak + (final - peak) * done
