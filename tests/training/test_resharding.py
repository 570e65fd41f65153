"""A checkpoint fills any other number of ranks and ZeRO stage: weights, average and moments equal per parameter."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from starflow.checkpoints import Progress, TrainedInfo
from starflow.model import STARFlow
from starflow.objectstore import open_store
from tests.training.small_snapshot import TEXT, VAE
from training.architecture import architecture
from training.checkpoint import Saver
from training.ema import EMA
from training.engine import Engine, parameter_groups
from training.lease import Lease
from training.resume import resume


def work(rank, config, resumed, steps, folder):
    """One rank: resume or start, leave the whole state in a file, train, save."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(config.ranks)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=config.ranks)
    torch.manual_seed(7)
    engine = Engine(STARFlow(architecture(config)), config)
    ema = EMA(engine.fragments)
    store = open_store(config.store)
    step = 0
    if resumed:
        step = resume(store, config, engine, ema).step
    whole_state(engine, ema, folder / f"{config.ranks}-{config.zero_stage}-{rank}.safetensors")
    saver = Saver(config, config.store, engine, ema, "tester:1:1")
    losses = []
    for _ in range(steps):
        generator = torch.Generator().manual_seed(step)
        latents = torch.randn(12, 4, 8, 8, generator=generator)
        mine = slice(rank * 12 // config.ranks, (rank + 1) * 12 // config.ranks)
        loss, _ = engine.backward([(latents[mine], torch.zeros(12 // config.ranks, 6, 24))])
        engine.step(1e-3)
        ema.update(0.5)
        dist.all_reduce(loss)
        losses.append(loss / config.ranks)
        step += 1
    trained = TrainedInfo(
        run=config.run, step=step, samples=0, snapshot="s", vae=VAE, text_encoder=TEXT.name, latent_noise=0.1,
        held_out=0.0,
    )  # fmt: skip
    metrics = folder / "metrics.jsonl"
    metrics.touch()
    saver.begin(trained, Progress(samples=0, optimizer_steps=engine.optimizer_steps), metrics if rank == 0 else None)
    saver.wait(lambda: None)
    assert saver.error == ""
    saver.close()
    save_file({"losses": torch.stack(losses)}, folder / f"losses-{rank}.safetensors")
    dist.destroy_process_group()


def whole_state(engine, ema, path):
    """Every value this rank owns, placed in whole parameters of zeros; ranks add up to everything."""
    found = {}
    for kind in ("master", "exp_avg", "exp_avg_sq", "ema", "owners"):
        found |= {f"{kind}/{name}": torch.zeros(shape) for name, shape in engine.shapes.items()}
    for fragment, average in zip(engine.fragments, ema.averages, strict=True):
        values = {k: getattr(fragment, k) for k in ("master", "exp_avg", "exp_avg_sq")}
        for kind, value in (values | {"ema": average, "owners": torch.ones_like(average)}).items():
            found[f"{kind}/{fragment.name}"].view(-1)[fragment.start : fragment.start + len(value)] = value
    save_file(found, path)


def run(config, folder, resumed, steps):
    folder.mkdir()
    mp.spawn(work, (config, resumed, steps, folder), nprocs=config.ranks)
    ranks = [
        load_file(folder / f"{config.ranks}-{config.zero_stage}-{rank}.safetensors") for rank in range(config.ranks)
    ]
    return {key: sum(state[key] for state in ranks) for key in ranks[0]}, load_file(folder / "losses-0.safetensors")[
        "losses"
    ]


def check(make_config, store, tmp_path, layouts, steps=2):
    """Through each (ranks, stage) in turn, `steps` each; against one undisturbed rank."""
    Lease(store, "test", "tester:1:1", seconds=900).acquire()
    Lease(store, "calm", "tester:1:1", seconds=900).acquire()
    base = {"global_batch_size": 12, "keep_newest": 9}
    _, calm = run(make_config(run="calm", ranks=1, **base), tmp_path / "calm", False, steps * len(layouts))
    losses, before = [], None
    for number, (ranks, stage) in enumerate(layouts):
        config = make_config(ranks=ranks, zero_stage=stage, **base)
        state, found = run(config, tmp_path / str(number), number > 0, steps)
        assert all(bool((value == 1).all()) for key, value in state.items() if key.startswith("owners/"))
        if before is not None:
            with_moments = {k: v for k, v in state.items() if not k.startswith("owners/")}
            for key, value in with_moments.items():
                assert torch.equal(value, stored(store, steps * number, key)), key
        losses.append(found)
        before = state
    torch.testing.assert_close(torch.cat(losses), calm, rtol=1e-5, atol=1e-6)


def stored(store, step, key):
    """One parameter's values straight from the checkpoint's objects."""
    from starflow.checkpoints import load_manifest

    kind, _, name = key.partition("/")
    manifest = load_manifest(store, "test", step)
    whole = torch.zeros(manifest.parameters[name])
    objects = {"master": "weights", "ema": "ema"}.get(kind, "optimizer")
    prefix = f"{kind}/" if objects == "optimizer" else ""
    for shard in manifest.shards:
        for tensor, values in load_file(store.path(getattr(shard, objects).key)).items():
            parameter, _, start = tensor.rpartition("@")
            if parameter == prefix + name:
                whole.view(-1)[int(start) : int(start) + len(values)] = values
    return whole


def test_two_ranks_become_one_on_another_stage(make_config, store, tmp_path):
    check(make_config, store, tmp_path, [(2, 2), (1, 3)])


@pytest.mark.slow
def test_every_stage_and_two_to_three_to_one(make_config, store, tmp_path):
    check(make_config, store, tmp_path, [(2, 1), (2, 3), (3, 2), (3, 3), (1, 0), (2, 0), (2, 2), (1, 1)])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_to_one_to_two_to_three_over_ten_steps_each(make_config, store, tmp_path):
    check(make_config, store, tmp_path, [(2, 2), (1, 2), (2, 2), (3, 2)], steps=10)


def test_parameters_are_the_whole_state(make_config):
    """Checkpoints hold parameters; a buffer that is part of the state would be lost. Two groups, none empty."""
    flow = STARFlow(architecture(make_config()))
    assert set(flow.state_dict()) == {name for name, _ in flow.named_parameters()}
    groups = parameter_groups(flow, 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(group["params"] for group in groups)
