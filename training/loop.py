"""The training loop of one rank: batch, gradients, agreement, step, average, log, validate, save."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from starflow.checkpoints import Progress, TrainedInfo
from starflow.errors import StarflowError
from starflow.reader import SnapshotReader
from training.checkpoint import Saver
from training.config import TrainConfig
from training.ema import EMA, decay_at
from training.engine import Engine
from training.evaluate import held_out_bits
from training.examples import ExampleMaker, Examples, prefetch
from training.loader import Loader
from training.metrics import MetricsLog, ProgressLine
from training.order import BatchOrder
from training.samples import SampleGrids
from training.schedule import learning_rate

log = logging.getLogger(__name__)

#: Updates before gradient norms are compared with the usual one, and the memory of that.
SPIKE_WARMUP, SPIKE_MEMORY = 50, 0.98


class TrainingDivergedError(StarflowError):
    """Too many batches in a row had to be skipped."""


class SaveFailedError(StarflowError):
    """Too many saves in a row failed."""


@dataclass
class State:
    """What changes while training goes on, tensors aside; a checkpoint's `Progress` and back."""

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    usual_norm: float | None = None
    held_out_bits: float | None = None

    @classmethod
    def resumed(cls, step: int, progress: Progress) -> State:
        return cls(step, progress.skipped, progress.skipped_in_a_row, progress.usual_norm, progress.held_out_bits)

    def progress(self, samples: int, optimizer_steps: int) -> Progress:
        return Progress(
            samples=samples,
            optimizer_steps=optimizer_steps,
            skipped=self.skipped,
            skipped_in_a_row=self.skipped_in_a_row,
            usual_norm=self.usual_norm,
            held_out_bits=self.held_out_bits,
        )


@dataclass(frozen=True)
class Agreement:
    """What the ranks know of each other at a step."""

    loss: float
    nll: float
    stop: bool
    saving: bool
    saves_failed: bool


@dataclass
class Loop:
    """Everything a rank needs; `run` trains to the end or to a request to stop."""

    config: TrainConfig
    engine: Engine
    ema: EMA
    saver: Saver
    reader: SnapshotReader
    maker: ExampleMaker
    trained: TrainedInfo
    state: State
    metrics: MetricsLog | None
    flops_per_sample: float
    peak_tflops: float | None
    beat: Callable[[], None]
    stop_requested: Callable[[], bool]
    samples: SampleGrids | None = None
    _due: bool = field(default=False, init=False)

    def run(self) -> bool:
        """Trains; True when the last step is done and committed, False after a request to stop (saved, too)."""
        config = self.config
        order = BatchOrder(
            self.reader.counts, config.seed, config.global_batch_size, config.order_block, config.order_window
        )
        rank, ranks = dist.get_rank(), dist.get_world_size()
        line = ProgressLine(config.steps) if self.metrics else None
        with Loader(self.reader, order, rank, ranks, self.state.step, config.steps) as loader:
            examples = prefetch(self.maker.training(step, batch) for step, batch in loader)
            try:
                stopped = self._train(examples, order, line)
            finally:
                examples.close()  # type: ignore[attr-defined]
        if line:
            line.end()
        self._finish()
        return not stopped

    def _train(self, examples: Iterator[Examples], order: BatchOrder, line: ProgressLine | None) -> bool:
        while self.state.step < self.config.steps:
            began = time.perf_counter()
            batch = next(examples)
            waited = time.perf_counter() - began
            agreement, values = self._step(batch, order)
            self.beat()
            seconds = time.perf_counter() - began
            self._validate_if_due(values)
            self._sample_if_due(values)
            if self.metrics:
                values |= self._speed(seconds) | {"data_wait": waited, "text_seconds": batch.text_seconds}
                self.metrics.write(values)
                assert line is not None
                line.show(values)
            stop = agreement.stop and self.state.step < self.config.steps
            self._save_if_due(agreement, stop)
            if stop:
                return True
        return False

    def _step(self, batch: Examples, order: BatchOrder) -> tuple[Agreement, dict[str, float | None]]:
        """One optimizer step; the numbers of its log line."""
        config, state = self.config, self.state
        loss, nll = self.engine.backward(list(self._micro_batches(batch)))
        agreement = self._agree(loss, nll)
        if agreement.saves_failed:
            raise SaveFailedError(f"{config.max_failed_saves} saves in a row failed: {self.saver.error}")
        if state.usual_norm is not None and self.engine.optimizer_steps >= SPIKE_WARMUP:
            self.engine.norm_limit = config.spike_factor * state.usual_norm
        rate = learning_rate(config, state.step)
        result = self.engine.step(rate, skip=not math.isfinite(agreement.loss))
        if result.applied:
            self.ema.update(decay_at(config.ema_decay, self.engine.optimizer_steps - 1))
            usual = result.grad_norm if state.usual_norm is None else state.usual_norm
            state.usual_norm = SPIKE_MEMORY * usual + (1 - SPIKE_MEMORY) * result.grad_norm
            state.skipped_in_a_row = 0
        else:
            self._count_skipped(agreement, result.grad_norm, order)
        state.step += 1
        return agreement, {
            "step": state.step,
            "samples": self._samples(),
            "loss": agreement.loss,
            "bits_per_dim": agreement.nll / math.log(2),
            "grad_norm": result.grad_norm,
            "lr": rate,
            "skipped": state.skipped,
        }

    def _micro_batches(self, batch: Examples) -> Iterator[tuple[Tensor, Tensor | None]]:
        device, size = self.engine.device, self.config.micro
        for first in range(0, len(batch.latents), size):
            latents = batch.latents[first : first + size].to(device, non_blocking=True)
            condition = None
            if batch.condition is not None:
                condition = batch.condition[first : first + size].to(device, non_blocking=True)
            yield latents, condition

    def _agree(self, loss: Tensor, nll: Tensor) -> Agreement:
        """One small all-reduce a step tells every rank what any of them knows."""
        flags = [self.stop_requested(), self.saver.busy, self.saver.failures >= self.config.max_failed_saves]
        told = torch.stack([loss.double(), nll.double(), *loss.new_tensor(flags, dtype=torch.float64)])
        dist.all_reduce(told)
        mean_loss, mean_nll, stop, saving, failed = told.tolist()
        ranks = dist.get_world_size()
        return Agreement(mean_loss / ranks, mean_nll / ranks, stop > 0, saving > 0, failed > 0)

    def _count_skipped(self, agreement: Agreement, norm: float, order: BatchOrder) -> None:
        state, config = self.state, self.config
        state.skipped += 1
        state.skipped_in_a_row += 1
        if self.metrics:
            log.warning("step %d skipped: loss %g, gradient norm %g", state.step + 1, agreement.loss, norm)
        if state.skipped_in_a_row >= config.max_skipped:
            grid, ordinals = order.batch(state.step)
            ids = ", ".join(identity[:12] for identity in self.reader.ids(grid, ordinals))
            raise TrainingDivergedError(
                f"{state.skipped_in_a_row} batches in a row had a loss or gradient norm that is not finite or spikes "
                f"(last: loss {agreement.loss:g}, norm {norm:g}); lower learning_rate, or look at the samples of "
                f"step {state.step + 1}: {ids}"
            )

    def _speed(self, seconds: float) -> dict[str, float | None]:
        rate = self.config.global_batch_size / seconds
        speed: dict[str, float | None] = {"seconds": seconds, "images_per_second": rate}
        if self.peak_tflops:
            achieved = rate * self.flops_per_sample / self.config.ranks
            speed["share_of_peak"] = achieved / (self.peak_tflops * 1e12)
        return speed

    def _samples(self) -> int:
        return self.state.step * self.config.global_batch_size

    def _validate_if_due(self, values: dict[str, float | None]) -> None:
        step, config = self.state.step, self.config
        if step % config.validation_every and step != config.steps:
            return
        began = time.perf_counter()
        bits = held_out_bits(self.engine, self.maker, self.reader.held_out_side(), config, self.beat)
        if bits is not None and not math.isfinite(bits) and self.state.skipped_in_a_row:
            raise TrainingDivergedError(
                f"neither the batch nor the held-out likelihood of step {step} is finite: the weights have diverged; "
                f"lower learning_rate (now {config.learning_rate:g}) under another run name"
            )
        self.state.held_out_bits = bits
        if bits is not None:
            values |= {"held_out_bits_per_dim": bits, "validation_seconds": time.perf_counter() - began}

    def _sample_if_due(self, values: dict[str, float | None]) -> None:
        every, step = self.config.sample_every, self.state.step
        if self.samples is None or every is None or (step % every and step != self.config.steps):
            return
        began = time.perf_counter()
        picture = self.samples.draw(step, self.beat)
        values["sample_seconds"] = time.perf_counter() - began
        if self.metrics and picture:
            self.metrics.picture(step, picture)

    def _save_if_due(self, agreement: Agreement, stop: bool) -> None:
        """A save still in flight somewhere delays the next one; the last one and a requested one wait for it."""
        step, config = self.state.step, self.config
        last = stop or step == config.steps
        self._due = self._due or last or step % config.checkpoint_every == 0
        if self._due and (last or not agreement.saving):
            self._begin_save()
            self._due = False

    def _begin_save(self) -> None:
        self.saver.wait(self.beat)
        samples = self._samples()
        trained = self.trained.model_copy(update={"step": self.state.step, "samples": samples})
        progress = self.state.progress(samples, self.engine.optimizer_steps)
        self.saver.begin(trained, progress, self.metrics.path if self.metrics else None)

    def _finish(self) -> None:
        """Waits for the last save; tries it again while the limit allows."""
        self.saver.wait(self.beat)
        while self.saver.committed != self.state.step:
            if self.saver.failures >= self.config.max_failed_saves:
                raise SaveFailedError(
                    f"{self.saver.failures} saves in a row failed, the last at step {self.state.step}: "
                    f"{self.saver.error}"
                )
            self._begin_save()
            self.saver.wait(self.beat)
