"""The losses of decoder fine-tuning, against reference numbers and by hand."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from starflow.errors import ConfigError
from training.decoder_loss import (
    VGG_GROUPS,
    PatchDiscriminator,
    Perceptual,
    adaptive_weight,
    hinge,
    read_perceptual,
)

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def weights():
    """VGG-16 and LPIPS weights as their files hold them, drawn at random."""
    generator = torch.Generator().manual_seed(0)
    state, inputs = {}, 3
    for group in VGG_GROUPS:
        for index, outputs in group:
            scale = (2 / (9 * inputs)) ** 0.5
            state[f"features.{index}.weight"] = torch.randn(outputs, inputs, 3, 3, generator=generator) * scale
            state[f"features.{index}.bias"] = torch.randn(outputs, generator=generator) * 0.1
            inputs = outputs
    for number, group in enumerate(VGG_GROUPS):
        state[f"lin{number}.model.1.weight"] = torch.rand(1, group[-1][1], 1, 1, generator=generator)
    return state


def test_lpips_is_the_published_one(weights):
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1 for _ in range(2))
    distance = Perceptual(weights)
    # What the package lpips 0.1.4 gives for these pictures and weights.
    assert distance(first, second).tolist() == pytest.approx([0.7214734, 0.7048211], abs=2e-6)
    assert distance(first, first).tolist() == [0, 0]
    first.requires_grad_()
    distance(first, second).sum().backward()
    assert first.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in distance.parameters())


def test_perceptual_weights_come_from_two_files(weights, tmp_path):
    vgg = {name: value for name, value in weights.items() if name.startswith("features")}
    linear = {name: value for name, value in weights.items() if name.startswith("lin")}
    torch.save(vgg | {"classifier.0.weight": torch.zeros(2)}, tmp_path / "vgg16.pth")
    save_file(linear, tmp_path / "lpips.safetensors")
    found = read_perceptual([tmp_path / "vgg16.pth", tmp_path / "lpips.safetensors"])
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    with pytest.raises(ConfigError, match=r"vgg16\.pth lack lin0.* 4 more.*package lpips"):
        read_perceptual([tmp_path / "vgg16.pth"])


def test_unusable_perceptual_files_are_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.pth cannot be read"):
        read_perceptual([tmp_path / "none.pth"])
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ConfigError, match=r"text\.safetensors cannot be read"):
        read_perceptual([tmp_path / "text.safetensors"])
    torch.save({"code": nn.Linear(1, 1)}, tmp_path / "code.pth")
    with pytest.raises(ConfigError, match=r"code\.pth hold something other"):
        read_perceptual([tmp_path / "code.pth"])


def test_the_hinge_rewards_a_margin():
    assert hinge(torch.tensor([2.0]), torch.tensor([-2.0])) == 0
    assert hinge(torch.zeros(3), torch.zeros(3)) == 1
    assert hinge(torch.tensor([-1.0, 1.0]), torch.tensor([1.0, -1.0])) == 1


def test_the_adaptive_weight_is_the_ratio_of_gradients():
    last = nn.Parameter(torch.tensor([3.0, 4.0]))
    assert adaptive_weight(last.sum(), (2 * last).sum(), last).item() == pytest.approx(0.5, rel=1e-4)
    assert adaptive_weight(last.sum(), (0 * last).sum(), last) == 1e4


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_the_smallest_picture_leaves_one_logit(layers):
    side = PatchDiscriminator.smallest(layers)
    logits = PatchDiscriminator(8, layers)(torch.rand(1, 3, side, side))
    assert logits.shape == (1, 1, 1, 1)
    assert logits.requires_grad
