"""What saves memory or time changes nothing that is computed: ZeRO-3 with activation checkpointing, accumulation and
compilation. And two ranks agree on what one of them knows."""

from __future__ import annotations

import math
import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from starflow.model import STARFlow
from training.architecture import architecture
from training.engine import Engine
from training.loop import Loop

#: "none" last: it has DeepSpeed replace torch's linear function for the rest of the process.
MODES = ("selective", "full", "none")


def work(rank, configs, folder):
    """One rank: three steps under each configuration from the same weights; rank 0 writes the mean losses down."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    losses = {name: train(config, rank) for name, config in configs.items()}
    if rank == 0:
        torch.save(losses, folder / "losses.pt")
    torch.save(agree(rank), folder / f"agreement-{rank}.pt")
    dist.destroy_process_group()


def agree(rank):
    """What a rank knows when the second one's loss is not finite, and only that one was asked to stop."""
    loop = SimpleNamespace(
        stop_requested=lambda: rank == 1, saver=SimpleNamespace(busy=rank == 0, failures=0),
        config=SimpleNamespace(max_failed_saves=3),
    )  # fmt: skip
    found = Loop._agree(loop, torch.tensor([2.0, math.nan][rank]), torch.tensor([1.0, 3.0][rank]))
    return vars(found)


def train(config, rank):
    torch.manual_seed(7)
    flow = STARFlow(architecture(config))
    with torch.no_grad():  # away from the identity, where most gradients are zero
        for parameter in flow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    engine = Engine(flow, config)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(3):
        latents, text = torch.randn(8, 4, 8, 8, generator=generator), torch.randn(8, 6, 24, generator=generator)
        mine = slice(4 * rank, 4 * rank + 4)
        batches = zip(latents[mine].split(config.micro), text[mine].split(config.micro), strict=True)
        loss, _ = engine.backward(list(batches))
        engine.step(1e-2)
        dist.all_reduce(loss)
        losses.append(loss / 2)
    return torch.stack(losses)


def compare(make_config, tmp_path, variants):
    configs = {"plain": make_config(zero_stage=0)}
    configs |= {name: make_config(zero_stage=3, **values) for name, values in variants.items()}
    mp.spawn(work, (configs, tmp_path), nprocs=2)
    losses = torch.load(tmp_path / "losses.pt", weights_only=True)
    plain = losses.pop("plain")
    assert losses.keys() == variants.keys()
    assert abs(plain[0] - plain[2]) > 0.01  # it learns
    for name, found in losses.items():
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_zero_3_with_checkpointing_or_accumulation_computes_the_same(make_config, tmp_path):
    variants = {"accumulated": {"checkpointing": "selective", "micro_batch_size": 2}}
    compare(make_config, tmp_path, variants | {mode: {"checkpointing": mode} for mode in MODES})
    for rank in (0, 1):
        found = torch.load(tmp_path / f"agreement-{rank}.pt", weights_only=True)
        assert math.isnan(found.pop("loss"))
        assert found == {"nll": 2.0, "stop": True, "saving": True, "saves_failed": False}


@pytest.mark.slow
@pytest.mark.timeout(1500)  # compiling nine times takes as long as the machine is busy
def test_zero_3_compiled_with_checkpointing_computes_the_same(make_config, tmp_path):
    variants = {mode: {"checkpointing": mode, "compile": True} for mode in MODES}
    compare(make_config, tmp_path, variants)
