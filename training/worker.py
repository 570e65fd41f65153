"""One rank of a run: what torchrun starts. ``torchrun ... -m training.worker ATTEMPT_FILE``."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from starflow.cache import full_disk
from starflow.checkpoints import Checkpoint, TrainedInfo, list_steps
from starflow.errors import ConfigError, CorruptError, StarflowError, StoreError
from starflow.flops import training_flops
from starflow.manifest import get
from starflow.model import STARFlow
from starflow.objectstore import ObjectStore, open_store
from starflow.prices import load_prices
from starflow.reader import SnapshotReader
from starflow.snapshots import Snapshot
from training.architecture import architecture, check_data
from training.checkpoint import Saver
from training.conditions import Conditioner, make_conditioner
from training.config import TrainConfig
from training.ema import EMA
from training.engine import Engine
from training.examples import ExampleMaker
from training.initial import initialise
from training.launch import Attempt, Heart, Report, read_attempt, write_report
from training.lease import LeaseHeldError
from training.loop import Loop, SaveFailedError, State, TrainingDivergedError
from training.metrics import MetricsLog
from training.processes import die_with_parent
from training.record import own_snapshot
from training.resume import check_same_encoders, resume
from training.samples import SampleGrids, earlier_samples

#: Errors that come back however often the run is relaunched.
FINAL_ERRORS = (ConfigError, CorruptError, LeaseHeldError, TrainingDivergedError, SaveFailedError)


class Rank:
    """Sets up, resumes and runs one rank."""

    def __init__(self, attempt: Attempt) -> None:
        self.attempt, self.config = attempt, attempt.config
        self.rank = int(os.environ["RANK"])
        self._stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, lambda *_: self._stop.set())
        self.heart = Heart(attempt.folder, self.rank)

    def run(self) -> Report:
        """Trains to the end or to a request to stop."""
        self._connect()
        try:
            return self._train(open_store(self.config.store))
        finally:
            self.heart.beat()

    def _connect(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        # A rank that hangs is the supervisor's business, which sees it sooner; but not one that waits for another one
        # to fetch what it needs, which may take so much longer.
        dist.init_process_group(backend, timeout=timedelta(seconds=2 * self.config.hang_timeout))
        self.heart.beat()

    def _train(self, store: ObjectStore) -> Report:
        config, flow = self.config, architecture(self.config)
        snapshot = own_snapshot(store, config)
        check_data(flow, snapshot, config.preset)
        reader = open_reader(store, snapshot, config)
        device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"
        with self.heart.beating():  # also while it waits for a rank that is slower
            conditioner = make_conditioner(config, flow, reader.text, device)
            trained = self._trained(snapshot, conditioner.identity)
            torch.manual_seed(config.seed)
            model = STARFlow(flow)
            if config.init_from and not list_steps(store, config.run):
                initialise(model, config.init_from, trained)
            dist.barrier()  # the groups that the engine makes wait for others by limits of their own
            engine = Engine(model, config)
            ema = EMA(engine.fragments)
            checkpoint = resume(store, config, engine, ema)
        samples = self._samples(store, engine, ema, reader, conditioner)
        saver = Saver(config, config.store, engine, ema, self.attempt.owner)
        state = State()
        if checkpoint:
            check_same_encoders(trained, checkpoint.trained, f"run {config.run!r}")
            state = State.resumed(checkpoint.step, checkpoint.progress)
            saver.committed = checkpoint.step
        loop = Loop(
            config=config,
            engine=engine,
            ema=ema,
            saver=saver,
            reader=reader,
            maker=ExampleMaker(config, conditioner),
            trained=trained,
            state=state,
            metrics=self._metrics(store, checkpoint),
            flops_per_sample=training_flops(flow),
            peak_tflops=config.peak_tflops or self._known_peak(),
            beat=self.heart.beat,
            stop_requested=self._stop.is_set,
            samples=samples,
        )
        try:
            completed = loop.run()
        finally:
            saver.close()
            if samples:
                samples.close()
            if loop.metrics:
                loop.metrics.close()
        return Report(outcome="completed" if completed else "preempted")

    def _trained(self, snapshot: Snapshot, encoder: Any) -> TrainedInfo:
        config = self.config
        return TrainedInfo(
            run=config.run,
            step=0,
            samples=0,
            snapshot=snapshot.id,
            vae=snapshot.vae,
            text_encoder=config.text_encoder,
            text_identity=encoder,
            latent_noise=config.latent_noise,
            held_out=config.held_out,
            attribution=snapshot.attribution,
        )

    def _metrics(self, store: ObjectStore, checkpoint: Checkpoint | None) -> MetricsLog | None:
        if self.rank:
            return None
        if checkpoint is None:
            return MetricsLog(self.config)
        pictures = earlier_samples(store, self.config.run, checkpoint.step)
        return MetricsLog(self.config, get(store, checkpoint.metrics), pictures)

    @staticmethod
    def _known_peak() -> float | None:
        """TFLOP/s of this rank's GPU, if the price table has its kind."""
        if not torch.cuda.is_available():
            return None
        device = torch.cuda.get_device_name().lower()
        peaks = (machine.peak_tflops for machine in load_prices().machines if machine.name.lower() in device)
        return next((peak for peak in peaks if peak), None)

    def _samples(
        self, store: ObjectStore, engine: Engine, ema: EMA, reader: SnapshotReader, conditioner: Conditioner
    ) -> SampleGrids | None:
        if self.config.sample_every is None:
            return None
        return SampleGrids(self.config, store, engine, ema, reader, conditioner)


def open_reader(store: ObjectStore, snapshot: Snapshot, config: TrainConfig) -> SnapshotReader:
    """The training side of the snapshot, with the cache that the configuration allows."""
    return SnapshotReader(store, snapshot, config.shard_cache, config.held_out)


def failure(error: Exception, attempt: Attempt, rank: int) -> Report:
    """What to say of `error`, and whether another attempt may fare better: not on a full disk."""
    full = full_disk(error)
    if isinstance(error, StarflowError):
        retry = isinstance(error, StoreError) and not isinstance(error, FINAL_ERRORS) and full is None
        return Report(outcome="failed", reason=str(error), retry=retry)
    if full is not None:
        place = full.filename or attempt.config.folder
        reason = f"cannot write to {place}: {full.strerror}; free space there, or set cache= to another folder"
        return Report(outcome="failed", reason=reason, retry=False)
    trace = attempt.folder / f"error-{rank}.txt"
    trace.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    return Report(outcome="failed", reason=f"{type(error).__name__}: {error} (see {trace})")


def main() -> None:
    """Entry point; ends the process with status 0 after completion or a requested stop."""
    die_with_parent()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    attempt = read_attempt(Path(sys.argv[1]))
    rank = int(os.environ["RANK"])
    try:
        report = Rank(attempt).run()
    except Exception as error:  # noqa: BLE001 - whatever it is, the supervisor decides what comes next
        write_report(attempt.folder, rank, failure(error, attempt, rank))
    else:
        write_report(attempt.folder, rank, report)
        dist.destroy_process_group()
        return
    # Other ranks may be waiting for this one in a collective: leave without the usual goodbyes.
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    main()
