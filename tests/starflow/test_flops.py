"""Costs counted from the config, against the model itself."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from starflow import flops
from starflow.convert import our_shapes
from starflow.model import STARFlow
from starflow.presets import PRESETS
from tests.starflow.flows import PLAIN, TEXT, inputs


@pytest.mark.parametrize("name", list(PRESETS))
def test_parameters_are_the_models(name: str) -> None:
    assert flops.parameters(PRESETS[name]) == sum(shape.numel() for shape in our_shapes(PRESETS[name]).values())


def test_published_sizes() -> None:
    assert 3.8e9 < flops.parameters(PRESETS["t2i-256"]) < 3.9e9
    assert 1.4e9 < flops.parameters(PRESETS["imagenet-256"]) < 1.45e9


@pytest.mark.parametrize("config", [TEXT, PLAIN])
def test_forward_flops_are_those_that_run(config) -> None:
    x, text = inputs(config, batch=1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        STARFlow(config)(x, text)
    attention = sum(block.layers * 2 * config.width * block.sequence**2 for block in flops.blocks(config))
    counted = counter.get_total_flops()  # torch does not count the CPU's attention kernel
    assert counted == flops.forward_flops(config) - attention


@pytest.mark.parametrize("name", list(PRESETS))
def test_one_evaluation_a_token_costs_one_forward_pass(name: str) -> None:
    config = PRESETS[name]
    assert flops.sampling_flops(config, guided=False) == pytest.approx(flops.forward_flops(config), rel=1e-9)


def test_guided_batch_of_eight_fits_24_gib() -> None:
    assert flops.sampling_memory(PRESETS["t2i-256"], 8) < 20 * 2**30


def test_memory_falls_with_the_stage() -> None:
    memory = list(flops.training_memory(PRESETS["t2i-256"], 8).values())
    assert memory == sorted(memory, reverse=True)
    assert memory[0] == 8 * memory[3]
