"""The publish gate of a refresh: what is measured of what would be published, and the limits that it must keep.

It stands between the stages encode and publish. What it refuses is not lost: crawl, captions and latents stay in the
refresh's workspace. A refusal holds for exactly that candidate. The next refresh adds what is new by then and measures
all of it again, if it has a gate; `gate_accept` publishes the candidate as it is, `gate_discard` forgets it.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.config import RefreshConfig
from pipelines.state import RefreshState
from starflow.config import Config
from starflow.errors import ConfigError, StarflowError
from starflow.objectstore import ObjectStore
from starflow.snapshots import Counts as SampleCounts
from starflow.snapshots import Part, Snapshot

#: What the finished stages returned, by stage.
Counts = Mapping[str, Mapping[str, Any]]
#: p-value at and below which a sample counts as an outlier: so many of the old samples do themselves.
OUTLIER_LEVEL = 0.01


#: What becomes of refused work, and the ways on.
KEPT = (
    "nothing is published and the work is kept: the next refresh of this store adds what is new by then and measures "
    "all of it again, if it has a gate; or run it with gate_accept={0} to publish exactly this, or with "
    "gate_discard={0} to forget this and ask its URLs anew"
)


class GateRefusedError(StarflowError):
    """The gate was not passed: nothing is published and nothing is lost."""


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


def is_closed(state: RefreshState) -> bool:
    """Whether publishing has to wait for the gate: there is one, something to publish, and nobody has accepted it.

    Raises GateRefusedError where no gate would look at work that was refused, unless exactly this is accepted.
    """
    config = state.config
    if not (new_parts(state) or len(state.left())) or config.gate_accept == candidate_name(state):
        return False
    if config.gate == "off" and state.workspace.refused():
        wrong = "the named candidate is another one, and " if config.gate_accept or config.gate_discard else ""
        raise refused(state, f"{wrong}no gate measures {candidate_name(state)}, which holds work that was refused")
    return config.gate != "off"


def new_parts(state: RefreshState) -> tuple[Part, ...]:
    """The parts that the refresh would add."""
    return tuple(state.encoded.parts) if state.encoded is not None else ()


def candidate_name(state: RefreshState) -> str:
    """Names exactly what would be published: the refresh's number, and a hash of what comes and what leaves."""
    content = [*sorted(part.id for part in new_parts(state)), "", *sorted(state.left()["id"].to_pylist())]
    return f"{state.name}-{hashlib.sha256(' '.join(content).encode()).hexdigest()[:8]}"


def check(state: RefreshState, counts: Counts) -> None:
    """Returns when the automatic gate lets the refresh publish. Raises GateRefusedError when it does not."""
    if is_closed(state) and (over := exceeded(measure(state, counts))):
        raise refused(state, f"the gate refuses candidate {candidate_name(state)}: {over}")


def refused(state: RefreshState, why: str) -> GateRefusedError:
    """Remembers that the candidate was refused; the error that says so, `why`, and the ways on."""
    name = candidate_name(state)
    state.workspace.refuse(name)
    return GateRefusedError(f"{why}; {KEPT.format(name)}")


def measure(state: RefreshState, counts: Counts) -> list[Measure]:
    """Measures what is about to be published. `counts` holds what each finished stage returned, by stage.

    Raises ConfigError or NotFoundError when the checkpoint cannot score these samples.
    """
    config, parts = state.config, new_parts(state)
    left = Counter(state.left()["reason"].to_pylist())
    # What has not changed and what has left are no candidates; what has changed is.
    settled = counts["crawl"]["statuses"].get("unchanged", 0) + left.total() - left["changed"]
    asked = sum(batch.count for plan in state.plans if plan.round == 0 for batch in plan.batches) - settled
    kept = sum(part.count for part in parts)
    rejected = counts["filter"]["reasons"]
    copies = rejected.get("duplicate", 0) + rejected.get("near_duplicate", 0)
    quality = counts["caption"]["quality"]
    poor = sum(quality.get(what, 0) for what in ("empty", "stand_in", "repeated"))
    found = [
        _share("drops", asked - kept, asked, config.gate_drop_rate, "asked URLs gave no sample"),
        _share("duplicates", copies, asked, config.gate_duplicate_rate, "asked URLs show a picture that is there"),
        _share(
            "captions",
            poor,
            quality.get("pictures", 0),
            config.gate_caption_rate,
            "captions are missing or repeated",
        ),
    ]
    if state.parent and (total := state.parent.counts.total):
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(left.items())) or "none"
        what = f"samples of {state.parent.id} leave ({reasons})"
        found.append(_share("removals", left.total(), total, config.gate_removal_rate, what))
        if config.gate_checkpoint and parts:
            found.append(_outliers(state.store, state.parent, parts, config))
    return found


def _share(name: str, count: int, of: int, limit: float, what: str) -> Measure:
    return Measure(name=name, value=count / max(of, 1), limit=limit, detail=f"{count:,} of {of:,} {what}")


def exceeded(measures: Sequence[Measure]) -> str:
    """The sentence that names what is over its limit; "" when everything is within."""
    over = [f"{m.name} {m.value:.1%} (limit {m.limit:.1%}; {m.detail})" for m in measures if not m.passed]
    return ", ".join(over)


def candidate(state: RefreshState) -> Snapshot | None:
    """The new samples alone as a snapshot that is in no store: for readers, before anything is published."""
    parts = new_parts(state)
    if not parts:
        return None
    count = sum(part.count for part in parts)
    return Snapshot(
        id="candidate",
        number=0,
        parent=None,
        created="",
        image_size=state.config.image_size,
        vae=parts[0].vae,
        counts=SampleCounts(added=count, kept=0, total=count),
        dropped={},
        sources={},
        versions={},
        attribution=state.config.attribution,
        parts=parts,
    )


def _outliers(store: ObjectStore, parent: Snapshot, parts: Sequence[Part], config: RefreshConfig) -> Measure:
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
