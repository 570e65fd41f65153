"""The flow as mathematics: inverse, Jacobian, causality, gradients, likelihood, and refusals."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from starflow.model import FlowConfig, FlowOutput, STARFlow, in_order, rotary_angles, rotary_table, rotate
from starflow.presets import ASPECT_RATIOS, PRESETS, aspect_grid, get_preset
from tests.starflow.flows import LABELS, PLAIN, TEXT, inputs, random_flow

CONFIGS = [TEXT, PLAIN, LABELS, replace(TEXT, patch=2)]


def test_an_untrained_flow_is_the_identity() -> None:
    x, text = inputs(TEXT)
    output = STARFlow(TEXT)(x, text)
    torch.testing.assert_close(output.z, x)
    expected = 0.5 * x.square().mean((1, 2, 3)) + 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(output.nll, expected)


@pytest.mark.parametrize("config", CONFIGS)
def test_shapes_and_reductions(config: FlowConfig) -> None:
    x, text = inputs(config, batch=3)
    output = random_flow(config)(x, text)
    tokens = math.prod(config.tokens(*config.grid))
    assert isinstance(output, FlowOutput)
    assert output.z.shape == x.shape
    assert [tuple(logdet.shape) for logdet in output.logdets] == [(3, tokens, config.token_width)] * len(config.layers)
    expected = 0.5 * output.z.square().mean((1, 2, 3)) - sum(logdet.mean((1, 2)) for logdet in output.logdets)
    torch.testing.assert_close(output.loss, expected.mean())
    torch.testing.assert_close(output.nll.mean(), output.loss + 0.5 * math.log(2 * math.pi))
    assert output.regulariser() >= output.states[0].square().mean()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_inverse_of_forward_is_the_identity(config: FlowConfig, dtype: torch.dtype, limit: float) -> None:
    flow = random_flow(config).to(dtype)
    x, text = inputs(config)
    x, text = x.to(dtype), text.to(dtype) if text is not None and text.is_floating_point() else text
    with torch.no_grad():
        output = flow(x, text)
        back = flow.inverse(output.z, text)
    assert output.z.dtype == dtype
    assert (output.z - x).abs().max() > 0.1
    assert (back.x - x).abs().max() < limit
    for there, again in zip(output.logdets, back.logdets, strict=True):
        assert (there + again).abs().max() < limit


@pytest.mark.parametrize("config", [replace(TEXT, grid=(2, 2), channels=1), replace(PLAIN, grid=(2, 4), patch=2)])
def test_log_determinant_is_the_jacobians(config: FlowConfig) -> None:
    flow = random_flow(config, std=0.2).double()
    x, text = inputs(config, batch=1)
    x, text = x.double(), None if text is None else text.double()
    jacobian = torch.autograd.functional.jacobian(lambda v: flow(v, text).z.flatten(), x)
    expected = torch.linalg.slogdet(jacobian.reshape(x.numel(), x.numel())).logabsdet
    total = sum(logdet.sum() for logdet in flow(x, text).logdets)
    assert abs(total - expected) < 1e-9
    assert abs(total) > 0.1


@pytest.mark.parametrize("k", range(3))
def test_blocks_are_causal_and_alternate(k: int) -> None:
    """A block's output for a token depends on it and the tokens before it in its own order, and on no other."""
    flow = random_flow(TEXT).double()
    x, text = inputs(TEXT, batch=1)
    u = flow.patchify(x.double())
    table = flow.rotary((4, 4), u.device, u.dtype)
    block = flow.blocks[k]

    def output(grid_order: torch.Tensor) -> torch.Tensor:
        z, _ = block(in_order(k, grid_order), text.double(), table, lambda layer, h, rotary: layer(h, rotary))
        return in_order(k, z)

    jacobian = torch.autograd.functional.jacobian(output, u)[0, :, :, 0].abs().amax((1, 3))  # (T out, T in)
    reads_backwards = k % 2 == 0
    allowed = torch.ones(16, 16).tril() if not reads_backwards else torch.ones(16, 16).triu()
    assert (jacobian[allowed == 0] == 0).all()
    assert (jacobian[allowed == 1] > 0).all()


def test_only_the_deep_block_reads_text() -> None:
    flow = random_flow(TEXT)
    x, text = inputs(TEXT)
    one, two = flow(x, text), flow(x, text + 1)
    for same in (0, 1, 2):
        torch.testing.assert_close(one.states[same], two.states[same], rtol=0, atol=0)
    assert (one.z - two.z).abs().max() > 1e-3


def test_no_text_means_padding_and_no_label_its_own_embedding() -> None:
    flow, (x, text) = random_flow(TEXT), inputs(TEXT)
    torch.testing.assert_close(flow(x).z, flow(x, torch.zeros_like(text)).z)
    flow, (x, _) = random_flow(LABELS), inputs(LABELS)
    torch.testing.assert_close(flow(x).z, flow(x, torch.full((2,), LABELS.classes)).z)
    assert (flow(x).z - flow(x, torch.tensor([0, 1])).z).abs().max() > 1e-3


@pytest.mark.parametrize("config", CONFIGS)
def test_every_parameter_learns(config: FlowConfig) -> None:
    flow = random_flow(config).train()
    x, text = inputs(config)
    text = torch.arange(2) if config.classes else text
    optimizer = torch.optim.AdamW(flow.parameters(), lr=1e-2, weight_decay=0)
    before = {name: parameter.detach().clone() for name, parameter in flow.named_parameters()}
    flow(x, text).loss.backward()
    optimizer.step()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
        assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bfloat16_loss_is_within_one_percent(how: str) -> None:
    flow = random_flow(TEXT)
    x, text = inputs(TEXT, batch=8)
    expected = flow(x, text).loss
    if how == "weights":
        output = flow.bfloat16()(x, text)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            output = flow(x, text)
    assert output.z.dtype == output.logdets[0].dtype == torch.float32
    assert abs(output.loss - expected) < 0.01 * abs(expected)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointing_changes_no_gradient(mode: str) -> None:
    flow = random_flow(TEXT).train()
    x, text = inputs(TEXT)
    flow(x, text).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in flow.named_parameters()}
    flow.zero_grad()
    flow.checkpointing = mode  # type: ignore[assignment]
    flow(x, text).loss.backward()
    for name, parameter in flow.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_compiled_layers_agree() -> None:
    flow = random_flow(TEXT).train()
    x, text = inputs(TEXT)
    expected = flow(x, text)
    flow.compile_layers(backend="aot_eager")
    output = flow(x, text)
    torch.testing.assert_close(output.z, expected.z)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in flow.parameters())


@settings(max_examples=25, deadline=None)
@given(
    patch=st.sampled_from([1, 2]),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    batch=st.integers(1, 3),
    channels=st.integers(1, 4),
    kind=st.sampled_from(["text", "labels", "none"]),
)
def test_any_shape_inverts(patch: int, rows: int, columns: int, batch: int, channels: int, kind: str) -> None:
    config = FlowConfig(
        32,
        (1, 1),
        channels,
        patch,
        (4, 4),
        text_length=3 if kind == "text" else 0,
        text_width=5 if kind == "text" else 0,
        classes=4 if kind == "labels" else 0,
        head_dim=32,
    )
    flow = random_flow(config)
    x, text = inputs(config, batch, (rows * patch, columns * patch))
    with torch.no_grad():
        output = flow(x, text)
        torch.testing.assert_close(flow.inverse(output.z, text).x, x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(flow.unpatchify(flow.patchify(x), config.tokens(*x.shape[2:])), x, rtol=0, atol=0)


def test_patches_run_row_major_with_channels_fastest() -> None:
    flow = STARFlow(replace(PLAIN, patch=2, grid=(4, 4)))
    x = torch.arange(32.0).reshape(1, 2, 4, 4)
    u = flow.patchify(x)
    assert u.shape == (1, 4, 8)
    assert u[0, 1].tolist() == [2, 18, 3, 19, 6, 22, 7, 23]


def test_rotary_dot_products_depend_on_distance_alone() -> None:
    """In one row of cells, q at column a and k at column b meet with an angle that depends on a - b."""
    table = rotary_table(rotary_angles((1, 8), 8.0, 0, 64))
    q, k = torch.randn(64, dtype=torch.float64), torch.randn(64, dtype=torch.float64)
    rows = [rotate(v.expand(1, 8, 1, 64), table)[0, :, 0] for v in (q, k)]
    products = rows[0] @ rows[1].T
    for offset in range(1, 7):
        diagonal = products.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_rotary_positions_of_other_grids_share_the_nominal_area() -> None:
    wide, square = rotary_angles((2, 8), 4.0, 2, 64), rotary_angles((4, 4), 4.0, 2, 64)
    torch.testing.assert_close(wide[:2], square[:2])  # text does not depend on the grid
    assert wide.shape == square.shape
    torch.testing.assert_close(wide[2 + 7, 12], square[2 + 3, 12] * 7 / 3)


@pytest.mark.parametrize(
    ("x", "text", "message"),
    [
        (torch.zeros(2, 3, 4, 4), None, r"\(2, 3, 4, 4\).*\(B, 4, H, W\)"),
        (torch.zeros(4, 4, 4), None, r"\(4, 4, 4\)"),
        (torch.zeros(2, 4, 5, 4), None, r"5 x 4 is not divisible by patch 2"),
        (torch.zeros(2, 4, 4, 4), torch.zeros(2, 3, 9), r"\(2, 3, 9\).*\(2, 3, 8\)"),
        (torch.zeros(2, 4, 4, 4), torch.zeros(1, 3, 8), r"\(1, 3, 8\).*\(2, 3, 8\)"),
        (torch.full((2, 4, 4, 4), torch.nan), None, "not finite"),
        (torch.zeros(2, 4, 4, 4), torch.full((2, 3, 8), torch.inf), "not finite"),
        (torch.zeros(2, 4, 4, 4, dtype=torch.long), None, "int64"),
    ],
)
def test_what_does_not_fit_is_refused(x: torch.Tensor, text: torch.Tensor | None, message: str) -> None:
    flow = STARFlow(replace(TEXT, patch=2))
    with pytest.raises(ValueError, match=message):
        flow(x, text)
    with pytest.raises(ValueError, match=message):
        flow.inverse(x, text)


def test_wrong_conditions_are_refused() -> None:
    with pytest.raises(ValueError, match="unconditional"):
        STARFlow(PLAIN)(torch.zeros(1, 2, 4, 4), torch.zeros(1, 3, 8))
    with pytest.raises(ValueError, match=r"\(1, 3, 8\).*\(1,\) integers"):
        STARFlow(LABELS)(torch.zeros(1, 2, 4, 4), torch.zeros(1, 3, 8))


@pytest.mark.parametrize(
    "change",
    [
        {"width": 65},
        {"head_dim": 16},
        {"layers": ()},
        {"layers": (0, 1)},
        {"text_width": 0},
        {"classes": 3},
        {"channels": 0},
        {"patch": 3},
    ],
)
def test_impossible_configs_are_refused(change: dict) -> None:
    with pytest.raises(ValueError, match=str(next(iter(change.values()))).replace("(", r"\(").replace(")", r"\)")):
        replace(TEXT, **change)


def test_config_survives_json() -> None:
    for config in PRESETS.values():
        assert FlowConfig(**config.to_dict()) == config


def test_presets_and_buckets() -> None:
    assert get_preset("t2i-256").layers == (2, 2, 2, 2, 2, 24)
    with pytest.raises(Exception, match=r"huge.*tiny, emoji"):
        get_preset("huge")
    for config in PRESETS.values():
        area = math.prod(config.grid)
        for ratio in ASPECT_RATIOS:
            height, width = aspect_grid(config, ratio)
            config.tokens(height, width)
            assert abs(height * width / area - 1) < 0.3
    assert aspect_grid(PRESETS["t2i-256"], (16, 9)) == (24, 43)


def test_learns_the_entropy_of_a_known_density() -> None:
    """Exact likelihood is a number that can be checked: three Gaussians in the plane, 4.3 deviations apart.

    The mean of log p - log q over true samples estimates the Kullback-Leibler divergence: how far the learned
    entropy lies above the true one, and never below it by more than the error of the sample.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    means, std, steps = torch.tensor([[1.5, 0.0], [-0.75, 1.3], [-0.75, -1.3]]), 0.6, 450

    def draw(count: int) -> torch.Tensor:
        return means[torch.randint(3, (count,))] + std * torch.randn(count, 2)

    # Two tokens of one value: only many alternating blocks bend a plane into three islands.
    flow = STARFlow(replace(PRESETS["tiny"], layers=(1,) * 6, channels=1, grid=(1, 2), text_length=0, text_width=0))
    average = copy.deepcopy(flow)
    optimizer = torch.optim.AdamW(flow.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=1e-4)
    warm_cosine = lambda i: min(1, (i + 1) / 50) * 0.5 * (1 + math.cos(math.pi * i / steps))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_cosine)
    for _ in range(steps):
        optimizer.zero_grad()
        flow(draw(512).view(-1, 1, 1, 2)).loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for mean, parameter in zip(average.parameters(), flow.parameters(), strict=True):
                mean.lerp_(parameter, 0.02)
    points = draw(50_000)
    square = (points.unsqueeze(1) - means).square().sum(-1)
    log_p = torch.logsumexp(-square / (2 * std**2), 1) - math.log(3 * 2 * math.pi * std**2)
    with torch.no_grad():
        log_q = -2 * average(points.view(-1, 1, 1, 2)).nll
    entropy, above = -log_p.mean(), log_p - log_q
    gaussian = math.log(2 * math.pi * math.e) + 0.5 * torch.logdet(points.T.cov())
    assert gaussian > 1.1 * entropy  # one Gaussian would not do
    assert above.mean() < 0.02 * entropy
    assert above.mean() > -4 * above.std() / len(points) ** 0.5
