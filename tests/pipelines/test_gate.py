"""The publish gate: what is measured, what is over a limit, and what the flow does about it."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from prefect.exceptions import FlowPauseTimeout

from pipelines import flows
from pipelines.config import RefreshConfig
from pipelines.gate import GateRefusedError, Measure, candidate, candidate_name, exceeded, is_closed, measure
from pipelines.revalidation import LEFT
from starflow.encoders import VAEIdentity
from starflow.errors import ConfigError
from starflow.objectstore import open_store
from starflow.parts import LayerPlan, part_from_arrays
from starflow.snapshots import publish

VAE = VAEIdentity(name="test", sha256="0" * 64, scaling_factor=1.0, channels=2, downsampling=2)
COUNTS: dict[str, dict[str, Any]] = {
    "crawl": {"statuses": {"ok": 80, "unchanged": 20, "failed": 20}},
    "filter": {"reasons": {"duplicate": 6, "near_duplicate": 4, "blank": 10}},
    "caption": {"quality": {"pictures": 80, "empty": 2, "refused:http_400": 4, "stand_in": 3, "repeated": 3}},
}
NOBODY = LEFT.empty_table()


def left(*reasons: str) -> pa.Table:
    """Samples of the parent that leave for these reasons."""
    return pa.table({"id": [f"{row:064x}" for row in range(len(reasons))], "reason": reasons}, schema=LEFT)


def config(**values: Any) -> RefreshConfig:
    return RefreshConfig(urls="list.txt", store="store", **values)


def part(store: Any, count: int, seed: int, spread: float = 1.0) -> Any:
    """A part of `count` normal latents with that standard deviation."""
    random = np.random.default_rng(seed)
    mean = (spread * random.normal(size=(count, 2, 4, 4))).astype(np.float16)
    table = pa.table({"id": [f"{seed:032x}{row:032x}" for row in range(count)], "url": [""] * count})
    layer = (LayerPlan(origin="alt-text", version="1"), ["text"] * count)
    return part_from_arrays(store, VAE, mean, np.full_like(mean, 1e-3), table, [layer])


@pytest.fixture
def state(tmp_path: Path) -> Any:
    """A refresh that asked for 120 URLs, of which 20 had not changed, and encoded 60 samples."""
    store = open_store(str(tmp_path / "store"))
    batch = types.SimpleNamespace(count=60)
    retries = types.SimpleNamespace(round=1, batches=[batch])
    done: list[str] = []
    workspace = types.SimpleNamespace(delete=lambda: done.append("deleted"), refuse=done.append)
    return types.SimpleNamespace(
        store=store,
        config=config(gate="automatic"),
        name="7",
        left=lambda: NOBODY,
        parent=publish(store, parent=None, parts=[part(store, 200, 1)], image_size=8),
        plans=[types.SimpleNamespace(round=0, batches=[batch, batch]), retries],
        encoded=types.SimpleNamespace(parts=[part(store, 60, 2)]),
        workspace=workspace,
        done=done,
    )


def test_rates_are_shares_of_what_was_asked(state: Any) -> None:
    found = {each.name: each.value for each in measure(state, COUNTS)}
    assert found == {"drops": 0.4, "duplicates": 0.1, "captions": 0.1, "removals": 0.0}


def test_what_leaves_is_a_share_of_the_parent_and_no_drop(state: Any) -> None:
    state.left = lambda: left(*["gone"] * 15, *["opted_out"] * 5, *["changed"] * 20)
    found = {each.name: each for each in measure(state, COUNTS)}
    assert found["removals"].value == 40 / 200
    assert found["removals"].detail.endswith("leave (changed 20, gone 15, opted_out 5)")
    assert exceeded([found["removals"]]).startswith("removals 20.0% (limit 10.0%; 40 of 200 samples of 00000001-")
    assert found["drops"].value == 20 / 80, "20 of 120 have not changed, 20 have left: 80 were candidates, 60 came"
    state.encoded = None
    assert {each.name: each.value for each in measure(state, COUNTS)}["drops"] == 1.0
    assert is_closed(state)
    assert candidate(state) is None


def test_nothing_to_publish_needs_no_gate(state: Any) -> None:
    assert is_closed(state)
    state.encoded = None
    assert not is_closed(state)


def test_a_candidate_is_named_by_all_that_comes_and_leaves(state: Any) -> None:
    names = {candidate_name(state)}
    state.left = lambda: left("gone")
    names.add(candidate_name(state))
    state.encoded.parts = [*state.encoded.parts, part(state.store, 3, 5)]
    names.add(candidate_name(state))
    assert len(names) == 3
    assert all(name.startswith("7-") for name in names)
    for accepted, closed in ((min(names - {candidate_name(state)}), True), (candidate_name(state), False)):
        state.config = config(gate="automatic", gate_accept=accepted)
        assert is_closed(state) is closed


def test_only_what_is_over_its_limit_is_named() -> None:
    good, bad = (Measure(name=n, value=v, limit=0.2, detail="1 of 2") for n, v in (("good", 0.2), ("bad", 0.21)))
    assert exceeded([good]) == ""
    assert exceeded([good, bad]) == "bad 21.0% (limit 20.0%; 1 of 2)"


class _Normal:
    """Stands for a trained flow whose density is a standard normal: no text, one latent value a token."""

    latent_noise, batch_size, device = 0.0, 32, torch.device("cpu")
    vae = types.SimpleNamespace(identity=VAE)
    model = None

    def condition(self, captions: list[str]) -> None:
        return None


@pytest.fixture
def normal(monkeypatch: pytest.MonkeyPatch) -> None:
    def score(model: Any, x: torch.Tensor, text: Any) -> Any:
        return types.SimpleNamespace(nats=-0.5 * x.square().flatten(1).sum(1), values=x[0].numel())

    monkeypatch.setattr("starflow.generate.Generator.open", lambda checkpoint: _Normal())
    monkeypatch.setattr("starflow.likelihood.score", score)


@pytest.mark.usefixtures("normal")
@pytest.mark.parametrize(("spread", "low", "high"), [(1.0, 0.0, 0.06), (2.0, 0.9, 1.0), (0.2, 0.9, 1.0)])
def test_outliers_are_too_unlikely_or_too_likely(state: Any, spread: float, low: float, high: float) -> None:
    """Noisier pictures than before, and blank ones."""
    state.encoded.parts = [part(state.store, 60, 3, spread)]
    state.config = config(gate_checkpoint="store/run")
    outliers = measure(state, COUNTS)[-1]
    assert outliers.name == "outliers"
    assert low <= outliers.value <= high


@pytest.mark.usefixtures("normal")
def test_a_checkpoint_of_another_vae_cannot_judge(state: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    other = VAE.model_copy(update={"name": "other", "sha256": "1" * 64})
    monkeypatch.setattr(_Normal, "vae", types.SimpleNamespace(identity=other))
    state.config = config(gate_checkpoint="store/run")
    with pytest.raises(ConfigError, match=r"VAE other.*latents of test"):
        measure(state, COUNTS)


def test_candidate_holds_the_new_samples_alone(state: Any) -> None:
    found = candidate(state)
    assert found is not None
    assert found.counts.total == 60


def answered(decision: str, monkeypatch: pytest.MonkeyPatch, measures: list[Measure] | None = None) -> None:
    """Replaces what needs a server: the task, the pause, the logger."""
    monkeypatch.setattr(flows, "gate_task", lambda *arguments: measures or [])
    monkeypatch.setattr(flows, "get_run_logger", lambda: types.SimpleNamespace(info=lambda *arguments: None))

    def pause(**options: Any) -> flows.Review:
        if decision == "nothing":
            raise FlowPauseTimeout
        return flows.Review(decision=decision)

    monkeypatch.setattr(flows, "pause_flow_run", pause)


@pytest.mark.parametrize(
    ("decision", "sentence"),
    [("refuse", "a person has refused.*work is kept"), ("discard", "discarded"), ("nothing", "within 24 hours.*kept")],
)
def test_a_person_may_refuse(state: Any, decision: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answered(decision, monkeypatch)
    state.config = config(gate="person")
    with pytest.raises(GateRefusedError, match=sentence):
        flows.pass_gate(state, COUNTS)
    assert state.done == (["deleted"] if decision == "discard" else [candidate_name(state)])


def test_a_person_may_publish_what_is_over_a_limit(state: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    over = [Measure(name="drops", value=1, limit=0.5, detail="1 of 1")]
    answered("publish", monkeypatch, over)
    state.config = config(gate="person")
    flows.pass_gate(state, COUNTS)
    state.config = config(gate="automatic")
    name = candidate_name(state)
    ways = f"drops 100.0%.*work is kept.*measures all of it again.*gate_accept={name} .*gate_discard={name} "
    with pytest.raises(GateRefusedError, match=f"refuses candidate {name}: {ways}"):
        flows.pass_gate(state, COUNTS)
    assert state.done == [name]


def test_limits_are_shares() -> None:
    for name in (
        "gate_drop_rate",
        "gate_duplicate_rate",
        "gate_caption_rate",
        "gate_removal_rate",
        "gate_outlier_rate",
    ):
        field = RefreshConfig.model_json_schema()["properties"][name]
        assert (field["minimum"], field["maximum"]) == (0, 1)
