"""One rank in this process: an engine that trains a little, saves and tells its state."""

from __future__ import annotations

import torch

from starflow.checkpoints import Progress, TrainedInfo
from starflow.model import STARFlow
from tests.training.small_snapshot import TEXT, VAE
from training.architecture import architecture
from training.checkpoint import Saver
from training.ema import EMA
from training.engine import Engine


class Setup:
    """An engine that has taken a few steps, and its saver."""

    def __init__(self, config, seed=0):
        torch.manual_seed(seed)
        self.config = config
        self.engine = Engine(STARFlow(architecture(config)), config)
        self.ema = EMA(self.engine.fragments)
        self.saver = None

    def train(self, steps):
        generator = torch.Generator().manual_seed(1)
        for _ in range(steps):
            latents = torch.randn(8, 4, 8, 8, generator=generator)
            self.engine.backward([(latents, torch.zeros(8, 6, 24))])
            self.engine.step(1e-3)
            self.ema.update(0.5)

    def begin(self, step, metrics):
        if self.saver is None:
            self.saver = Saver(self.config, self.config.store, self.engine, self.ema, "tester:1:1")
        trained = TrainedInfo(
            run=self.config.run, step=step, samples=8 * step, snapshot="s", vae=VAE, text_encoder=TEXT.name,
            latent_noise=0.1, held_out=0.0,
        )  # fmt: skip
        self.saver.begin(trained, Progress(samples=8 * step, optimizer_steps=self.engine.optimizer_steps), metrics)

    def save(self, step, metrics):
        self.begin(step, metrics)
        self.saver.wait(lambda: None)
        return self.saver.error

    def state(self):
        return [
            tensor.clone()
            for f, average in zip(self.engine.fragments, self.ema.averages, strict=True)
            for tensor in (f.master, f.exp_avg, f.exp_avg_sq, average)
        ]
