"""Scores, maps, interpolation, inpainting and typicality on latents."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from starflow.decoding import Jacobi
from starflow.likelihood import Typicality, decode, encode, explained, inpaint, interpolate, score, slerp
from starflow.model import STARFlow
from tests.starflow.flows import LABELS, TEXT, inputs, random_flow


def test_score_of_the_identity_flow_is_the_normal_density() -> None:
    x, text = inputs(TEXT)
    scored = score(STARFlow(TEXT), x, text)
    expected = torch.distributions.Normal(0, 1).log_prob(x)
    torch.testing.assert_close(scored.nats, expected.sum((1, 2, 3)))
    torch.testing.assert_close(scored.per_token, expected.sum(1))
    torch.testing.assert_close(scored.bits_per_dim, -expected.mean((1, 2, 3)) / math.log(2))


def test_token_parts_sum_to_the_score_and_lie_where_they_belong() -> None:
    config = replace(TEXT, patch=2, grid=(4, 8))
    flow = random_flow(config)
    x, text = inputs(config)
    scored = score(flow, x, text)
    assert scored.per_token.shape == (2, 2, 4)
    torch.testing.assert_close(scored.nats, -flow(x, text).nll * x[0].numel(), rtol=1e-4, atol=1e-3)
    with torch.no_grad():  # block 0 reads backwards: its first token, the last of the grid, has a fixed sigma
        one, two = flow(x, text), flow(x + torch.randn_like(x), text)
    assert torch.equal(one.logdets[0][:, 0], two.logdets[0][:, 0])


def test_what_the_caption_explains() -> None:
    flow = random_flow(TEXT)
    x, text = inputs(TEXT)
    null = torch.zeros_like(text)
    gain = explained(flow, x, text, null)
    torch.testing.assert_close(gain.nats, score(flow, x, text).nats - score(flow, x, null).nats)
    torch.testing.assert_close(explained(flow, x, text, text).nats, torch.zeros(2))


@pytest.mark.parametrize("jacobi", [None, Jacobi(1e-10)])
def test_decode_inverts_encode(jacobi: Jacobi | None) -> None:
    flow = random_flow(TEXT)
    x, text = inputs(TEXT)
    torch.testing.assert_close(decode(flow, encode(flow, x, text), text, jacobi), x, rtol=1e-4, atol=1e-4)


def test_interpolation_ends_at_both_images() -> None:
    flow = random_flow(TEXT)
    x, text = inputs(TEXT)
    path = interpolate(flow, x, text, 5)
    torch.testing.assert_close(path[[0, -1]], x, rtol=1e-4, atol=1e-4)
    assert all((path[i] - path[j]).abs().max() > 1e-3 for i in range(5) for j in range(i))
    with pytest.raises(ValueError, match="1 steps"):
        interpolate(flow, x, text, 1)


def test_labels_are_not_blended() -> None:
    flow = random_flow(LABELS)
    x, _ = inputs(LABELS)
    assert interpolate(flow, x, torch.tensor([2, 2]), 3).shape == (3, 2, 4, 4)
    with pytest.raises(ValueError, match=r"\[1, 2\]"):
        interpolate(flow, x, torch.tensor([1, 2]), 3)


def test_slerp_keeps_the_radius() -> None:
    a, b = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    a, b = (v / v.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for v in (a, b))
    for t in (0.0, 0.3, 1.0):
        torch.testing.assert_close(slerp(a, b, t).flatten(1).norm(dim=1), torch.ones(3))
    torch.testing.assert_close(slerp(a, a, 0.5), a)


def test_inpainting_touches_only_the_hole_and_climbs() -> None:
    flow = random_flow(TEXT)
    x, text = inputs(TEXT)
    x = flow.inverse(x, text).x.detach()  # a likely picture
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[..., 1:3, 1:3] = True
    filled = inpaint(flow, x, mask, text, rounds=6, seed=3)
    known = ~mask.expand_as(x)
    assert torch.equal(filled[known], x[known])
    assert (filled - x)[~known].abs().min() > 0
    assert torch.equal(filled, inpaint(flow, x, mask, text, rounds=6, seed=3))
    noise = torch.where(mask, torch.randn(x.shape, generator=torch.Generator().manual_seed(3)), x)
    assert (score(flow, filled, text).nats > score(flow, noise, text).nats).all()


@pytest.mark.parametrize("mask", [torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 5, dtype=torch.bool)])
def test_masks_that_do_not_fit_are_refused(mask: torch.Tensor) -> None:
    x, text = inputs(TEXT)
    with pytest.raises(ValueError, match="mask"):
        inpaint(random_flow(TEXT), x, mask, text)


def test_typicality_finds_both_kinds_of_outlier() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(999, generator=generator, dtype=torch.float64)
    test = Typicality(reference)
    values = torch.tensor([-6.0, 0.0, 6.0], dtype=torch.float64)
    percentile, p = test.percentile(values), test.p_value(values)
    assert percentile[0] == 0
    assert percentile[2] == 100
    assert p[0] == p[2] == 1 / 1000
    assert p[1] > 0.8
    others = torch.randn(2000, generator=generator, dtype=torch.float64)
    assert 0.03 < float((test.p_value(others) <= 0.05).double().mean()) < 0.08  # the level is kept
