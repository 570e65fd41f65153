"""The loop with a stand-in for the engine: what is logged, skipped, saved and when it gives up."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch

from starflow.checkpoints import TrainedInfo
from starflow.reader import SnapshotReader
from starflow.snapshots import load_snapshot
from tests.training.small_snapshot import TEXT, VAE
from training.architecture import architecture
from training.conditions import make_conditioner
from training.engine import StepResult
from training.examples import ExampleMaker
from training.loop import Loop, SaveFailedError, State, TrainingDivergedError
from training.metrics import MetricsLog

pytestmark = pytest.mark.usefixtures("one_rank")


class FakeEngine:
    """Remembers what it was given; `norms` are the gradient norms of its steps."""

    device = torch.device("cpu")

    def __init__(self, norms=(), losses=()):
        self.norms, self.losses, self.seen = iter(norms), iter(losses), []
        self.norm_limit, self.optimizer_steps = math.inf, 0

    def backward(self, batches):
        self.seen.append(torch.cat([latents for latents, _ in batches]))
        loss = torch.tensor(next(self.losses, 1.0))
        return loss, loss

    def step(self, rate, skip=False):
        norm = next(self.norms, 1.0)
        applied = not skip and norm <= self.norm_limit
        self.optimizer_steps += applied
        return StepResult(norm, applied)

    def evaluate(self, latents, condition):
        return torch.ones(len(latents))


class FakeSaver:
    """Saves at once, or never: `failing` saves fail."""

    def __init__(self, failing=0):
        self.failing, self.steps, self.busy = failing, [], False
        self.failures, self.error, self.committed = 0, "", None

    def begin(self, trained, progress, metrics):
        self.failures = self.failures + 1 if self.failing else 0
        if self.failing:
            self.failing, self.error = self.failing - 1, "disk full"
        else:
            self.steps.append(trained.step)
            self.committed = trained.step

    def wait(self, beat):
        pass


class FakeEMA:
    def update(self, decay):
        pass


@pytest.fixture
def make_loop(make_config, store):
    def make(engine=None, saver=None, state=None, stop=lambda: False, **values):
        config = make_config(ranks=1, **values)
        reader = SnapshotReader(store, load_snapshot(store), config.cache / "snapshots", config.held_out)
        trained = TrainedInfo(
            run="test", step=0, samples=0, snapshot="s", vae=VAE, text_encoder=TEXT.name, latent_noise=0.1, held_out=0.1
        )
        maker = ExampleMaker(config, make_conditioner(config, architecture(config), reader.text, "cpu"))
        metrics = MetricsLog(config)
        return Loop(
            config=config, engine=engine or FakeEngine(), ema=FakeEMA(), saver=saver or FakeSaver(), reader=reader,
            maker=maker, trained=trained, state=state or State(), metrics=metrics, flops_per_sample=1.0,
            peak_tflops=config.peak_tflops,
            beat=lambda: None, stop_requested=stop,
        )  # fmt: skip

    return make


def logged(loop):
    return [json.loads(line) for line in loop.metrics.path.read_text().splitlines()]


def test_logs_each_step_validates_and_saves_on_time(make_loop):
    loop = make_loop(steps=7, peak_tflops=1e-6)
    assert loop.run()
    found = logged(loop)
    assert [line["step"] for line in found] == list(range(1, 8))
    assert [line["samples"] for line in found] == list(range(8, 64, 8))
    assert found[0]["bits_per_dim"] == pytest.approx(1 / math.log(2))
    assert {"loss", "grad_norm", "lr", "seconds", "images_per_second", "data_wait", "share_of_peak"} <= found[0].keys()
    assert [line["step"] for line in found if "held_out_bits_per_dim" in line] == [3, 6, 7]
    assert loop.saver.steps == [2, 4, 6, 7]


def test_a_resumed_loop_sees_what_the_first_one_would_have(make_loop):
    whole, second = FakeEngine(), FakeEngine()
    make_loop(whole, steps=6).run()
    make_loop(second, state=State(step=4), steps=6, micro_batch_size=2).run()
    assert torch.equal(torch.cat(whole.seen[4:]), torch.cat(second.seen))
    assert not torch.equal(whole.seen[0], whole.seen[1])


def test_blocks_and_window_decide_the_order(make_loop):
    def seen(**values):
        engine = FakeEngine()
        make_loop(engine, steps=2, **values).run()
        return torch.cat(engine.seen)

    default, small, narrow = seen(), seen(order_block=4), seen(order_block=4, order_window=1)
    assert torch.equal(default, seen(order_block=256, order_window=64))
    assert not any(torch.equal(one, other) for one, other in itertools.combinations((default, small, narrow), 2))


def test_a_request_to_stop_saves_first(make_loop):
    asked = iter([False, False, True])
    loop = make_loop(stop=lambda: next(asked), steps=100, checkpoint_every=50)
    assert not loop.run()
    assert loop.saver.steps == [3]


def test_what_is_not_finite_is_skipped_counted_and_finally_fatal(make_loop):
    loop = make_loop(FakeEngine(losses=[1.0, math.nan, 1.0]), steps=4)
    assert loop.run()
    assert [line["loss"] for line in logged(loop)] == [1.0, None, 1.0, 1.0]
    assert (loop.state.skipped, loop.state.skipped_in_a_row, loop.engine.optimizer_steps) == (1, 0, 3)
    ids = loop.reader.ids((8, 8), np.arange(loop.reader.count((8, 8))))
    with pytest.raises(TrainingDivergedError) as error:
        make_loop(FakeEngine(losses=[math.inf] * 9), steps=9, max_skipped=3).run()
    named = str(error.value).rpartition(": ")[2].split(", ")
    assert len(named) == 8
    assert {name in {identity[:12] for identity in ids} for name in named} == {True}


def test_weights_that_have_diverged_end_the_run_before_the_limit_of_skipped_batches(make_loop):
    class Diverged(FakeEngine):
        def evaluate(self, latents, condition):
            return torch.full((len(latents),), math.nan)

    with pytest.raises(TrainingDivergedError, match=r"step 3 is finite.*lower learning_rate"):
        make_loop(Diverged(losses=[math.nan] * 9), steps=9).run()
    assert make_loop(Diverged(), steps=3).run()  # a held-out sample alone ends nothing


def test_spikes_are_known_by_the_usual_norm(make_loop):
    loop = make_loop(FakeEngine(norms=[1.0] * 55 + [30.0]), steps=60, checkpoint_every=60)
    loop.run()
    assert loop.state.skipped == 1
    assert loop.state.usual_norm == pytest.approx(1.0)


def test_failed_saves_are_tried_again_and_then_fatal(make_loop):
    loop = make_loop(saver=FakeSaver(failing=2), steps=2)
    assert loop.run()
    assert loop.saver.steps == [2]
    with pytest.raises(SaveFailedError, match="disk full"):
        make_loop(saver=FakeSaver(failing=99), steps=50).run()
