"""Sampling: cached equals uncached, Jacobi within its tolerance, guidance, seeds, the score denoiser."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from starflow.decoding import BlockDecoder, Jacobi, Steps, StoppingRule, best_window, guide, invert
from starflow.model import FlowConfig, STARFlow, in_order
from starflow.sampling import denoise, draw_noise, sample
from tests.starflow.flows import LABELS, PLAIN, TEXT, inputs, random_flow

GUIDED = replace(TEXT, grid=(8, 8))


def relative_mse(x: Tensor, reference: Tensor) -> float:
    error = (x - reference).square().mean((1, 2, 3)) / reference.square().mean((1, 2, 3))
    return float(error.max())


def reference_inverse(flow: STARFlow, z: Tensor, text: Tensor | None, null: Tensor | None, w: float) -> Tensor:
    """Token by token with the whole network run anew each time: no cache, no shared prefix."""
    u = flow.patchify(z)
    grid = flow.config.tokens(*z.shape[2:])
    table = flow.rotary(grid, u.device, u.dtype)
    for k in reversed(range(len(flow.blocks))):
        block, noise = flow.blocks[k], in_order(k, u)
        u = torch.zeros_like(noise)
        for i in range(u.shape[1]):
            gaussians = [
                block.gaussians(u, condition, table, lambda layer, h, rotary: layer(h, rotary))
                for condition in ((text, null) if w and block.sees_text else (text,))
            ]
            sigma, mean = (torch.cat(parts) for parts in zip(*gaussians, strict=True))
            if len(gaussians) == 2:
                sigma, mean = guide(sigma, mean, w)
            u[:, i] = noise[:, i] * sigma[:, i] + mean[:, i]
        u = in_order(k, u)
    return flow.unpatchify(u, grid)


@pytest.mark.parametrize("config", [TEXT, PLAIN, LABELS, replace(TEXT, patch=2)])
@pytest.mark.parametrize("guidance", [0.0, 2.5])
def test_cached_equals_uncached(config: FlowConfig, guidance: float) -> None:
    flow = random_flow(config)
    noise, text = inputs(config, batch=3, grid=(2, 6))
    null = torch.zeros_like(text) if config.text_length else None
    uncached_null = torch.full_like(text, config.classes) if config.classes else null
    with torch.no_grad():
        expected = reference_inverse(flow, noise, text, uncached_null, guidance)
    x = sample(flow, noise, text, null, guidance)
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("std", [0.05, 0.1, 0.15])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize("window", [4, 16, None])
def test_jacobi_stays_within_its_tolerance(std: float, tolerance: float, window: int | None) -> None:
    for seed in range(3):
        flow = random_flow(GUIDED, seed, std)
        noise, text = inputs(GUIDED, batch=2, seed=seed)
        null = torch.zeros_like(text[:1])
        exact = sample(flow, noise, text, null, 2.0)
        x = sample(flow, noise, text, null, 2.0, method="jacobi", tolerance=tolerance, window=window)
        assert relative_mse(x, exact) < tolerance


def test_jacobi_needs_fewer_evaluations_than_tokens() -> None:
    flow = random_flow(GUIDED, std=0.05)
    noise, text = inputs(GUIDED)
    jacobi = Jacobi(1e-3, 16)
    with torch.inference_mode():
        invert(flow, noise, text, jacobi=jacobi)
    assert [window for _, window in jacobi.evaluations] == [16] * 3
    assert max(evaluations for evaluations, _ in jacobi.evaluations) <= 64 / 3


def test_windows_suit_each_block() -> None:
    """Guided blocks have twice the rows, so smaller windows; none exceeds the sequence."""
    assert best_window(256, 1, "cpu") > best_window(256, 2, "cpu") > best_window(256, 8, "cpu") >= 16
    assert best_window(1024, 16, "cuda") > best_window(1024, 16, "cpu")
    assert best_window(4, 1, "cpu") == 4
    flow = random_flow(GUIDED, std=0.05)
    noise, text = inputs(GUIDED)
    jacobi = Jacobi()
    with torch.inference_mode():
        invert(flow, noise, text, torch.zeros_like(text), 2.0, jacobi)
    deep, *shallow = (window for _, window in jacobi.evaluations)
    assert shallow == [best_window(64, 2, "cpu")] * 2
    assert deep == best_window(64, 4, "cpu")


def fixed_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode as on a GPU, but for the recording of graphs."""
    monkeypatch.setattr(Steps, "FIXED", ("cpu",))
    monkeypatch.setattr(Steps, "BUCKET", 24)


@pytest.mark.parametrize("count", [1, 5])
def test_a_step_of_fixed_shapes_equals_one_of_growing_shapes(count: int) -> None:
    flow = random_flow(TEXT)
    table = flow.rotary((4, 4), torch.device("cpu"), torch.float32)
    _, text = inputs(TEXT, batch=4)
    before = torch.randn(2, 16, 4)
    with torch.inference_mode():
        growing, fixed = (BlockDecoder(flow.blocks[2], 16, table, text, 2, 1.5) for _ in range(2))
        for start in range(0, 16 - count, count):
            stop, place = start + count, torch.arange(start, start + count)
            expected = growing(before[:, start:stop], slice(start, stop), stop)
            for one, other in zip(fixed(before[:, start:stop], place, 16), expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    for one, other in zip(fixed.caches, growing.caches, strict=True):
        torch.testing.assert_close(one.keys, other.keys, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [GUIDED, PLAIN, LABELS])
@pytest.mark.parametrize("window", [None, 5, 64])
def test_fixed_shapes_draw_the_same_sample(
    config: FlowConfig, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = random_flow(config)
    noise, text = inputs(config)
    null = torch.zeros_like(text) if config.text_length else None
    expected = sample(flow, noise, text, null, 1.5)
    fixed_shapes(monkeypatch)
    torch.testing.assert_close(sample(flow, noise, text, null, 1.5), expected, rtol=1e-4, atol=1e-5)
    x = sample(flow, noise, text, null, 1.5, method="jacobi", window=window)
    assert relative_mse(x, expected) < 1e-3
    close = sample(flow, noise, text, null, 1.5, method="jacobi", tolerance=1e-12, window=window)
    torch.testing.assert_close(close, expected, rtol=1e-4, atol=1e-4)


def test_fixed_shapes_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU records: one shape for each bucket of 24 tokens, whatever the place."""
    fixed_shapes(monkeypatch)
    seen = set()
    steps = Steps(lambda place, end: seen.add((tuple(place.shape), end)), 64, 7, torch.device("cpu"))
    for start in range(64):
        steps(start)
    assert seen == {((7,), 24), ((7,), 48), ((7,), 64)}
    assert steps.place.tolist() == list(range(57, 64))  # full to the end


def test_jacobi_is_exact_where_iteration_does_not_contract() -> None:
    rule = StoppingRule(1e-2)
    assert rule(torch.full((4,), 1e-3)) == 4
    rule = StoppingRule(1e-2)
    assert rule(torch.tensor([1.0, 1.0, 1.0, 1.0])) == 1
    assert rule(torch.tensor([4.0, 4.0, 4.0, 1e-9])) == 1  # moves grow: only the exact token leaves
    assert rule.contraction == 2


def test_no_guidance_is_the_conditional_sample() -> None:
    flow = random_flow(TEXT)
    noise, text = inputs(TEXT)
    plain = sample(flow, noise, text)
    torch.testing.assert_close(sample(flow, noise, text, text, 3.0), plain)  # nothing to move away from
    assert (sample(flow, noise, text, torch.zeros_like(text), 3.0) - plain).abs().max() > 1e-2


def test_guidance_formula() -> None:
    sigma, mean = torch.tensor([[0.5], [1.0]]), torch.tensor([[1.0], [-1.0]])
    guided_sigma, guided_mean = guide(sigma, mean, 2.0)
    s = 0.25
    q = 1 + 2 - 2 * s
    torch.testing.assert_close(guided_sigma, torch.tensor([[0.5 / q**0.5]]))
    torch.testing.assert_close(guided_mean, torch.tensor([[(3 * 1 + 2 * s) / q]]))


def test_rows_of_a_batch_are_independent() -> None:
    flow = random_flow(TEXT)
    noise, text = inputs(TEXT, batch=3)
    together = sample(flow, noise, text, torch.zeros(1, 3, 8), 1.5)
    alone = [sample(flow, noise[i : i + 1], text[i : i + 1], torch.zeros(1, 3, 8), 1.5) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_each_distinct_caption_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = random_flow(TEXT)
    noise, text = inputs(TEXT, batch=4)
    rows = []
    prefix = type(flow.blocks[2]).prefix
    monkeypatch.setattr(type(flow.blocks[2]), "prefix", lambda block, t: rows.append(len(t)) or prefix(block, t))
    sample(flow, noise, text[:1].expand(4, -1, -1), torch.zeros(1, 3, 8), 2.0)
    assert rows == [2]


def test_only_the_text_block_runs_guided_rows() -> None:
    flow = random_flow(TEXT)
    table = flow.rotary((4, 4), torch.device("cpu"), torch.float32)
    rows = [BlockDecoder(block, 16, table, None, 3, 0.0).caches[0].keys.shape[:2] for block in flow.blocks[:2]]
    assert rows == [(3, 16), (3, 16)]
    _, text = inputs(TEXT, batch=6)
    assert BlockDecoder(flow.blocks[2], 16, table, text, 3, 1.0).caches[0].keys.shape[:2] == (6, 19)


def test_seeds_reproduce_whatever_the_batch() -> None:
    assert torch.equal(draw_noise(7, 3, (4, 8, 8)), draw_noise(7, 3, (4, 8, 8)))
    assert not torch.equal(draw_noise(7, 3, (4, 8, 8)), draw_noise(7, 4, (4, 8, 8)))
    assert not torch.equal(draw_noise(7, 3, (4, 8, 8)), draw_noise(8, 3, (4, 8, 8)))


@pytest.mark.parametrize("method", ["sequential", "jacobi"])
def test_progress_counts_every_token(method: str) -> None:
    flow = random_flow(TEXT)
    noise, text = inputs(TEXT)
    seen: list[int] = []
    sample(flow, noise, text, method=method, progress=seen.append)  # type: ignore[arg-type]
    assert sum(seen) == 3 * 16


@pytest.mark.parametrize("method", ["sequential", "jacobi"])
@pytest.mark.parametrize("fixed", [False, True])
def test_float64_noise_and_autocast_change_nothing(method: str, fixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network runs in the type of its weights, whatever surrounds it and whatever the noise is."""
    flow = random_flow(TEXT)
    noise, text = inputs(TEXT)
    arguments = (text, text[:1] * 0, 2.0, method, 1e-12)
    expected = sample(flow, noise, *arguments)  # type: ignore[arg-type]
    if fixed:
        fixed_shapes(monkeypatch)
    wide = sample(flow, noise.double(), *arguments)  # type: ignore[arg-type]
    assert wide.dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        surrounded = sample(flow, noise, *arguments)  # type: ignore[arg-type]
    for x in (wide.float(), surrounded):
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


def test_guided_labels_need_no_null_label() -> None:
    flow = random_flow(LABELS)
    noise, labels = inputs(LABELS, batch=3)
    expected = sample(flow, noise, labels, guidance=2.0)
    assert torch.equal(sample(flow, noise, labels, torch.tensor([LABELS.classes]), 2.0), expected)


def test_samples_are_float32_in_a_bfloat16_network() -> None:
    flow = random_flow(TEXT, std=0.05)
    noise, text = inputs(TEXT)
    exact = sample(flow, noise, text)
    x = sample(flow.bfloat16(), noise, text)
    assert x.dtype == torch.float32
    assert relative_mse(x, exact) < 0.01


def test_denoising_moves_by_the_score() -> None:
    """For an identity flow p is a standard normal, whose score is -x."""
    x, text = inputs(TEXT)
    flow = STARFlow(TEXT)
    torch.testing.assert_close(denoise(flow, x, text, 0.3), x - 0.09 * x)
    assert all(parameter.requires_grad for parameter in flow.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "jacoby"}, "jacoby.*sequential"),
        ({"guidance": -1.0}, "-1.0"),
        ({"guidance": 2.0}, "null_text"),
        ({"tolerance": 0.0}, "tolerance 0.0"),
        ({"window": 0}, "window 0"),
        ({"guidance": 1.0, "null_text": torch.zeros(2, 3, 9)}, r"\(2, 3, 9\)"),
    ],
)
def test_impossible_requests_are_refused(arguments: dict, message: str) -> None:
    noise, text = inputs(TEXT)
    with pytest.raises(ValueError, match=message):
        sample(random_flow(TEXT), noise, text, **arguments)
