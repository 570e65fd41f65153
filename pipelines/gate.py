"""The publish gate of a scheduled refresh: what is measured of the new samples, and the limits they must keep.

It stands between the stages encode and publish. What it refuses is not lost: crawl, captions and latents stay in the
refresh's workspace, and the next refresh of the store takes them up again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from pipelines.config import RefreshConfig
from pipelines.state import RefreshState
from starflow.config import Config
from starflow.errors import ConfigError, StarflowError
from starflow.objectstore import ObjectStore
from starflow.snapshots import Counts, Part, Snapshot

#: p-value at and below which a sample counts as an outlier: so many of the old samples do themselves.
OUTLIER_LEVEL = 0.01


class GateRefusedError(StarflowError):
    """The gate was not passed: nothing is published and nothing is lost."""


class GatedRefreshConfig(RefreshConfig):
    """A refresh with a gate before its snapshot is published."""

    gate: Literal["off", "automatic", "person"] = Field(
        "off",
        title="Publish gate",
        description="automatic: publish only within the limits below; person: pause until somebody has looked at the "
        "run's artifacts and decided.",
    )
    gate_drop_rate: float = Field(
        0.5, title="Gate: drops", description="Largest share of the asked URLs that gives no sample.", ge=0, le=1
    )
    gate_duplicate_rate: float = Field(
        0.3,
        title="Gate: duplicates",
        description="Largest share of the asked URLs that shows a picture which is there already.",
        ge=0,
        le=1,
    )
    gate_caption_rate: float = Field(
        0.3, title="Gate: captions", description="Largest share of captions that are empty or repeated.", ge=0, le=1
    )
    gate_checkpoint: str | None = Field(
        None,
        title="Gate: checkpoint",
        description="STORE/RUN or STORE/RUN@STEP that scores new samples against those of the parent snapshot; "
        "null: likelihoods are not looked at.",
    )
    gate_outlier_rate: float = Field(
        0.1,
        title="Gate: outliers",
        description="Largest share of new samples less typical than 99 of 100 samples of the parent.",
        ge=0,
        le=1,
    )
    gate_samples: int = Field(
        256,
        title="Gate: samples",
        description="New samples that are scored, and old ones.",
        ge=16,
        le=65536,
    )
    gate_hours: float = Field(
        24.0, title="Gate: hours", description="How long a person may take to decide; then it is refused.", gt=0, le=720
    )


class Measure(Config):
    """One quality figure beside its limit, both shares from 0 to 1."""

    name: str
    value: float
    limit: float
    detail: str

    @property
    def passed(self) -> bool:
        """Whether the limit is kept."""
        return self.value <= self.limit


def measure(state: RefreshState, config: GatedRefreshConfig, counts: Mapping[str, Mapping[str, Any]]) -> list[Measure]:
    """Measures what is about to be published. `counts` holds what each finished stage returned, by stage.

    Raises ConfigError or NotFoundError when the checkpoint cannot score these samples.
    """
    parts = state.encoded.parts
    unchanged = counts["crawl"]["statuses"].get("unchanged", 0)
    asked = sum(batch.count for plan in state.plans if plan.round == 0 for batch in plan.batches) - unchanged
    kept = sum(part.count for part in parts)
    reasons = counts["filter"]["reasons"]
    copies = reasons.get("duplicate", 0) + reasons.get("near_duplicate", 0)
    quality = counts["caption"]["quality"]
    poor = quality.get("empty", 0) + quality.get("repeated", 0)
    found = [
        _share("drops", asked - kept, asked, config.gate_drop_rate, "asked URLs gave no sample"),
        _share("duplicates", copies, asked, config.gate_duplicate_rate, "asked URLs show a picture that is there"),
        _share(
            "captions", poor, quality.get("pictures", 0), config.gate_caption_rate, "captions are empty or repeated"
        ),
    ]
    if config.gate_checkpoint and state.parent and state.parent.counts.total:
        found.append(_outliers(state.store, state.parent, parts, config))
    return found


def _share(name: str, count: int, of: int, limit: float, what: str) -> Measure:
    return Measure(name=name, value=count / max(of, 1), limit=limit, detail=f"{count:,} of {of:,} {what}")


def exceeded(measures: Sequence[Measure]) -> str:
    """The sentence that names what is over its limit; "" when everything is within."""
    over = [f"{m.name} {m.value:.1%} (limit {m.limit:.1%}; {m.detail})" for m in measures if not m.passed]
    return ", ".join(over)


def candidate(state: RefreshState) -> Snapshot:
    """The new samples alone as a snapshot that is in no store: for readers, before anything is published."""
    parts = tuple(state.encoded.parts)
    count = sum(part.count for part in parts)
    return Snapshot(
        id="candidate",
        number=0,
        parent=None,
        created="",
        image_size=state.config.image_size,
        vae=parts[0].vae,
        counts=Counts(added=count, kept=0, total=count),
        dropped={},
        sources={},
        versions={},
        attribution=state.config.attribution,
        parts=parts,
    )


def _outliers(store: ObjectStore, parent: Snapshot, parts: Sequence[Part], config: GatedRefreshConfig) -> Measure:
    """The share of new samples whose likelihood is atypical for the parent's."""
    from starflow.generate import Generator
    from starflow.likelihood import Typicality

    generator = Generator.open(config.gate_checkpoint or "")
    if generator.vae.identity.sha256 != parent.vae.sha256:
        raise ConfigError(
            f"gate_checkpoint {config.gate_checkpoint} was trained with VAE {generator.vae.identity.name}, "
            f"{store.url} holds latents of {parent.vae.name}; name a checkpoint of this store"
        )
    new = parent.model_copy(update={"parts": tuple(parts)})
    old_nats, new_nats = (_nats(generator, store, snapshot, config.gate_samples) for snapshot in (parent, new))
    # Of few old samples none is as rare as the level: then an outlier lies beyond all of them.
    level = max(OUTLIER_LEVEL, 1 / (1 + len(old_nats)))
    outliers = int((Typicality(old_nats).p_value(new_nats) <= level).sum())
    what = f"scored samples are atypical for {parent.id}"
    return _share("outliers", outliers, len(new_nats), config.gate_outlier_rate, what)


def _nats(generator: Any, store: ObjectStore, snapshot: Snapshot, count: int) -> Any:
    """(N,) nats per dimension of `count` samples spread evenly over the snapshot, drawn as training draws them."""
    import torch

    from starflow.likelihood import score
    from starflow.reader import SnapshotReader

    random = torch.Generator().manual_seed(0)
    found = []
    with tempfile.TemporaryDirectory(prefix="starflow-gate-") as cache:
        reader = SnapshotReader(store, snapshot, Path(cache))
        total = sum(reader.counts.values())
        chosen = np.unique(np.linspace(0, total - 1, min(count, total)).astype(np.int64))
        first = 0
        for grid, length in reader.counts.items():
            ordinals = chosen[(chosen >= first) & (chosen < first + length)] - first
            first += length
            for few in np.split(ordinals, range(generator.batch_size, len(ordinals), generator.batch_size)):
                if not len(few):
                    continue
                batch = reader.gather(grid, few)
                mean, std = (torch.from_numpy(array).float() for array in (batch.mean, batch.std))
                noise = std * torch.randn(mean.shape, generator=random)
                noise = noise + generator.latent_noise * torch.randn(mean.shape, generator=random)
                scored = score(
                    generator.model, (mean + noise).to(generator.device), generator.condition(batch.captions)
                )
                found.append(scored.nats.double().cpu() / scored.values)
    return torch.cat(found)
