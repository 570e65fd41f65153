"""What the demo's model has learned: likelihoods of held-out pairs, and pictures for held-out prompts."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from infra.demo.report import Column, Scores, sample_sheet
from starflow.generate import Generator
from starflow.likelihood import score
from starflow.objectstore import open_store
from starflow.reader import SnapshotReader
from starflow.snapshots import load_snapshot
from training.curves import draw_curves, run_metrics

#: Held-out pairs are compared with the captions of so many others each.
SHUFFLES = 8
#: Rows of the sample sheet.
PROMPTS = 16
SEED = 0


@dataclass(frozen=True)
class Pairs:
    """Held-out samples: posterior means and standard deviations (N, C, h, w), and captions."""

    means: Tensor
    stds: Tensor
    captions: list[str]


class Results:
    """Reads the newest checkpoint of a run and the snapshot it was trained on."""

    def __init__(self, store: str, run: str, cache: Path, update: Callable[..., None]) -> None:
        self.url, self.name, self.update = store, run, update
        self.store = open_store(store)
        self.generator = Generator.from_checkpoint(store, run)
        trained = self.generator.trained
        assert trained is not None, "a checkpoint names what it was trained on"
        self.info = trained
        snapshot = load_snapshot(self.store, self.info.snapshot)
        self.training = SnapshotReader(self.store, snapshot, cache / "snapshots", self.info.held_out)
        self.grid = self.training.grids[0]

    @cached_property
    def held_out(self) -> Pairs:
        """Every held-out sample with its heaviest caption."""
        reader = self.training.held_out_side()
        ordinals = np.arange(reader.count(self.grid))
        batch = reader.gather(self.grid, ordinals)
        means, stds = (torch.from_numpy(values.astype(np.float32)) for values in (batch.mean, batch.std))
        return Pairs(means, stds, batch.captions)

    def score(self) -> Scores:
        """Likelihoods of held-out latents, drawn as training draws them, under right, wrong and no captions."""
        pairs = self.held_out
        count = len(pairs.captions)
        generator = torch.Generator().manual_seed(SEED)
        posterior, noise = (torch.randn(pairs.means.shape, generator=generator) for _ in range(2))
        latents = pairs.means + pairs.stds * posterior + self.info.latent_noise * noise
        texts = self._texts(pairs.captions)
        self.update(completed=0, total=SHUFFLES + 2, text="scoring")
        own = self._bits(latents, texts)
        none = self._bits(latents, self._texts([""]).expand_as(texts))
        # Rolling by different amounts pairs every picture with other pictures' captions, each used once a roll.
        shifts = np.linspace(1, count - 1, SHUFFLES).astype(int)
        others = []
        for shift in shifts.tolist():
            others.append(self._bits(latents, texts.roll(shift, 0)))
            self.update(completed=len(others) + 2)
        wins = (own < torch.stack(others)).double().mean(0)  # (N,) share of wrong captions that each picture rejects
        return Scores(
            count=count,
            shuffles=SHUFFLES,
            own=float(own.mean()),
            shuffled=float(torch.stack(others).mean()),
            none=float(none.mean()),
            win_rate=float(wins.mean()),
            win_rate_error=float(wins.std() / count**0.5),
        )

    def _bits(self, latents: Tensor, texts: Tensor) -> Tensor:
        """(N,) bits per dimension."""
        model = self.generator.model
        parts = [score(model, *pair).bits_per_dim for pair in zip(latents.split(64), texts.split(64), strict=True)]
        return torch.cat(parts)

    def draw(self, guidances: Sequence[float]) -> Image.Image:
        """Samples for captions that training has not seen, beside the nearest training picture and the real one."""
        rows = self._unseen()
        captions = [self.held_out.captions[row] for row in rows]
        columns = []
        for number, guidance in enumerate(guidances):
            self.update(completed=number, total=len(guidances), text=f"drawing at guidance {guidance:g}")
            latents = self.generator.sample_latents(captions, guidance, SEED, self.grid)
            columns.append(Column(f"guidance {guidance:g}", self.generator.pictures(latents)))
        nearest, real = self._nearest(latents), self.held_out.means[rows]
        columns.append(Column("nearest training", self.generator.pictures(nearest), apart=True))
        columns.append(Column("the real one", self.generator.pictures(real)))
        return sample_sheet(captions, columns)

    def _unseen(self) -> list[int]:
        """Held-out samples, evenly spread, whose caption no training sample has."""
        ordinals = np.arange(self.training.count(self.grid))
        seen = {caption for captions in self.training.captions(self.grid, ordinals) for caption in captions}
        captions = self.held_out.captions
        rows = [i for i, caption in enumerate(captions) if caption not in seen and caption not in captions[:i]]
        return [rows[i] for i in np.linspace(0, len(rows) - 1, min(PROMPTS, len(rows))).astype(int)]

    def _nearest(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) the training latent with the highest correlation to each: distances would favour faint ones."""
        ordinals = np.arange(self.training.count(self.grid))
        means = torch.from_numpy(self.training.gather(self.grid, ordinals).mean).float()
        samples, others = (
            torch.nn.functional.normalize(x.flatten(1) - means.flatten(1).mean(0), dim=1) for x in (latents, means)
        )
        return means[(samples @ others.T).argmax(1)]

    def _texts(self, captions: Sequence[str]) -> Tensor:
        """(N, L, E)"""
        texts = self.generator.condition(captions)
        assert texts is not None, "the demo's flow reads text"
        return texts

    def curves(self) -> bytes:
        """The run's curves as PNG."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "curves.png"
            draw_curves(self.store, [self.name], path)
            return path.read_bytes()

    def summary(self) -> dict[str, Any]:
        """What the report says of the run besides `starflow runs show`."""
        held_out = [
            line["held_out_bits_per_dim"]
            for line in run_metrics(self.store, self.name)
            if line.get("held_out_bits_per_dim") is not None
        ]
        parameters = sum(parameter.numel() for parameter in self.generator.model.parameters())
        return {"first_held_out_bits_per_dim": held_out[0], "parameters": f"{parameters / 1e6:.1f} million"}
