"""`starflow plan`: hours, dollars, storage and requests of a data set and a model, before anything is started.

The model is linear: a stage does its work at so many units a second on each device (a GPU, or a CPU core), after a
start that costs a fixed time. Rates come from `benchmarks/results/` where a benchmark has been run on such a machine,
otherwise from an assumption that the plan names. `benchmarks/plan.py` compares predictions with small real runs.
"""

from __future__ import annotations

import json
from math import ceil
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pipelines.encode_plan import PART_SHARDS
from starflow.architecture import FlowConfig
from starflow.config import Config
from starflow.errors import ConfigError
from starflow.flops import parameters, training_flops
from starflow.latents import layout
from starflow.parts import CHUNK_BYTES, SHARD_BYTES
from starflow.presets import get_preset
from starflow.prices import Machine, Prices, load_prices
from training.recipes import RECIPES

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
#: Operations a pixel of encoding with the VAE of Stable Diffusion (34 M parameters), counted at 256 x 256.
VAE_FLOPS_PER_PIXEL = 4.16e6
#: Objects a crawl batch leaves beside its tar: work list, fetched, captions, samples, drops, three records.
BATCH_OBJECTS, BATCH_TABLES = 8, 5
#: Objects of a part beside its shards: group, two arrays, index, samples, captions, members, record; with text states.
PART_OBJECTS, TEXT_OBJECTS, PART_TABLES = 8, 3, 4
#: Objects of a refresh: plan, kept pictures, ledger; then encode plan, list of parts, snapshot.
CRAWL_OBJECTS, PUBLISH_OBJECTS = 3, 3
#: Objects above this go up in so large parts, each a request.
MULTIPART_BYTES = 64 * 2**20
#: Bytes of a sample in the tables of its part, of a URL in ledger and batch tables, of a table without rows.
SAMPLE_TABLE_BYTES, URL_TABLE_BYTES, TABLE_BYTES = 200, 450, 5600
#: Weights, average and optimizer are objects of each rank.
CHECKPOINT_OBJECTS = 3
#: A checkpoint holds float32 weights, their average and two moments.
CHECKPOINT_BYTES_PER_PARAMETER = 16


class PlanConfig(Config):
    """What is to be done, on how many machines. Rates that are left out are measured or assumed ones."""

    preset: str = Field("t2i-256", description="Architecture and recipe to train.")
    images: int = Field(700_000_000, gt=0, description="Pictures of the snapshot.")
    steps: int | None = Field(None, gt=0, description="Training steps; the recipe's if left out.")
    global_batch_size: int | None = Field(None, gt=0, description="Samples a step; the recipe's if left out.")
    downsampling: int = Field(8, gt=0, description="Pixels of a picture to one of its latents, each way.")
    posterior: bool = Field(True, description="Means and standard deviations are stored, as refreshes do.")
    text_states: int = Field(0, ge=0, description="Stored text states a picture: tokens times width; 0 for none.")
    text_encoder_parameters: float = Field(
        1.22e9, ge=0, description="Of the frozen encoder that runs while training (FLAN-T5-XL's); 0 with stored states."
    )

    url_yield: float = Field(0.7, gt=0, le=1, description="Pictures of the snapshot for each URL (assumed).")
    image_bytes: int = Field(150_000, gt=0, description="Mean size of a picture as fetched (assumed).")
    gateway: bool = Field(True, description="Fetches pass a NAT gateway, as with `starflow cluster render`.")
    batch_size: int = Field(10_000, gt=0, description="URLs of one crawl batch.")
    ledger_partitions: int = Field(4096, gt=0, description="Of the ledger of URLs.")
    caption_share: float = Field(1.0, ge=0, le=1, description="Share of the pictures that a model captions.")
    caption_rate: float = Field(10.0, gt=0, description="Captions a second of one device (assumed).")

    crawl_machine: str = Field("cpu", description="Machine of the price table that fetches.")
    crawl_machines: int = Field(32, gt=0, description="How many fetch.")
    crawl_rate: float | None = Field(None, gt=0, description="URLs a second of one device.")
    caption_machine: str = Field("l40s", description="Machine that captions.")
    caption_machines: int = Field(128, gt=0, description="How many caption.")
    encode_machine: str = Field("l40s", description="Machine that encodes.")
    encode_machines: int = Field(32, gt=0, description="How many encode.")
    encode_rate: float | None = Field(None, gt=0, description="Pictures a second of one device.")
    encode_share_of_peak: float = Field(0.15, gt=0, le=1, description="Of a GPU's peak in encoding (assumed).")
    train_machine: str = Field("h100", description="Machine that trains.")
    train_machines: int = Field(16, gt=0, description="How many train.")
    train_tflops: float | None = Field(None, gt=0, description="TFLOP/s that one device achieves.")
    train_share_of_peak: float = Field(0.4, gt=0, le=1, description="Of a GPU's peak in training (assumed).")
    recompute: bool = Field(False, description="Full activation checkpointing: a third more work.")
    checkpoint_every: int = Field(1000, gt=0, description="Steps between checkpoints.")
    checkpoints_kept: int = Field(3, gt=0, description="Checkpoints that stay.")
    start_seconds: float = Field(300.0, ge=0, description="Until the machines of a stage work (assumed).")
    months: float = Field(1.0, gt=0, description="How long everything is stored.")


class Rate(Config):
    """Units a second of one device, and how that is known."""

    value: float = Field(gt=0)
    unit: str
    known: Literal["measured", "assumed", "given"]
    source: str


class Stage(Config):
    """One stage: time, money and requests."""

    name: str
    machine: str
    machines: int
    devices: int
    work: float = Field(description="In the rate's units.")
    rate: Rate
    hours: float = Field(description="From start to end.")
    machine_hours: float
    dollars: float = Field(description="Of the machines; requests and storage are counted apart.")
    puts: int = Field(description="Writing requests.")
    gets: int = Field(description="Reading requests, at most.")


class Plan(Config):
    """The whole of it, as `starflow plan --json` prints it."""

    config: PlanConfig
    parameters: int
    images_seen: int
    epochs: float
    stages: tuple[Stage, ...]
    storage_bytes: dict[str, int]
    storage_dollars: float
    request_dollars: float
    gateway_dollars: float = Field(description="What is fetched, through a NAT gateway.")
    machine_dollars: float
    dollars: float
    hours: float = Field(description="All stages one after the other.")
    prices: str
    assumed: tuple[str, ...] = Field(description="What nobody has measured.")


def make_plan(config: PlanConfig, prices: Prices | None = None, results: Path = RESULTS) -> Plan:
    """The plan. Raises ConfigError for an unknown preset or machine."""
    prices = prices or load_prices()
    flow = get_preset(config.preset)
    seen = images_seen(config)
    stages = (
        _crawl(config, prices, results),
        *([_caption(config, prices)] if config.caption_share else []),
        _encode(config, flow, prices, results),
        _train(config, flow, seen, prices, results),
    )
    storage = storage_bytes(config, flow)
    stored = sum(storage.values()) / 1e9 * prices.storage.gigabyte_month * config.months
    requests = sum(s.puts * prices.storage.put_thousand + s.gets * prices.storage.get_thousand for s in stages) / 1000
    machines = sum(stage.dollars for stage in stages)
    fetched = config.images * config.image_bytes / 1e9 * prices.gateway_gigabyte if config.gateway else 0.0
    return Plan(
        config=config,
        parameters=parameters(flow),
        images_seen=seen,
        epochs=seen / config.images,
        stages=stages,
        storage_bytes=storage,
        storage_dollars=stored,
        request_dollars=requests,
        gateway_dollars=fetched,
        machine_dollars=machines,
        dollars=stored + requests + fetched + machines,
        hours=sum(stage.hours for stage in stages),
        prices=f"{prices.region}, on demand, {prices.date}",
        assumed=_assumptions(config, stages),
    )


def images_seen(config: PlanConfig) -> int:
    """Samples over all steps, by the recipe where the plan does not say."""
    recipe = RECIPES[config.preset]
    return int((config.steps or recipe["steps"]) * (config.global_batch_size or recipe["global_batch_size"]))


def latent_bytes(config: PlanConfig, flow: FlowConfig) -> int:
    """Bytes of a picture's float16 arrays: latents and stored text states."""
    height, width = flow.grid
    return 2 * (flow.channels * height * width * (2 if config.posterior else 1) + config.text_states)


def storage_bytes(config: PlanConfig, flow: FlowConfig) -> dict[str, int]:
    """What lies in the store at the end, by kind."""
    urls = ceil(config.images / config.url_yield)
    chunk, shard = _layout(config, flow)
    tables = ceil(urls / config.batch_size) * BATCH_TABLES + config.ledger_partitions
    tables += ceil(config.images / (shard * PART_SHARDS)) * PART_TABLES
    return {
        "originals": config.images * config.image_bytes,
        "latents": ceil(config.images / chunk) * chunk * latent_bytes(config, flow),  # whole chunks
        "tables": config.images * SAMPLE_TABLE_BYTES + urls * URL_TABLE_BYTES + tables * TABLE_BYTES,
        "checkpoints": config.checkpoints_kept * CHECKPOINT_BYTES_PER_PARAMETER * parameters(flow),
    }


def training_flops_seen(config: PlanConfig, flow: FlowConfig) -> float:
    """Operations a sample costs in training, the frozen text encoder's forward pass included."""
    text = 2 * config.text_encoder_parameters * flow.text_length if not config.text_states else 0.0
    return training_flops(flow, config.recompute) + text


def stage(
    name: str, machine: Machine, machines: int, work: float, rate: Rate, start_seconds: float, puts: int, gets: int
) -> Stage:
    """Time and money of `work` units on all devices of the machines, after their start."""
    devices = machine.devices * machines
    hours = (start_seconds + work / (rate.value * devices)) / 3600
    return Stage(
        name=name,
        machine=machine.instance,
        machines=machines,
        devices=devices,
        work=work,
        rate=rate,
        hours=hours,
        machine_hours=hours * machines,
        dollars=hours * machines * machine.hourly,
        puts=puts,
        gets=gets,
    )


def _crawl(config: PlanConfig, prices: Prices, results: Path) -> Stage:
    urls = ceil(config.images / config.url_yield)
    batches = ceil(urls / config.batch_size)
    uploads = _upload_requests(config.batch_size * config.url_yield * config.image_bytes)
    # Measured with the demo's small pictures from loopback, which says nothing of a crawl of the web.
    file = results / "plan.json" if config.preset == "emoji" else None
    rate = _rate(config.crawl_rate, "URLs", file, "crawl_urls_per_second", 20.0)
    machine = prices.machine(config.crawl_machine)
    puts = batches * (BATCH_OBJECTS + uploads) + config.ledger_partitions + CRAWL_OBJECTS
    return stage("crawl", machine, config.crawl_machines, urls, rate, config.start_seconds, puts, 2 * puts)


def _caption(config: PlanConfig, prices: Prices) -> Stage:
    machine, work = prices.machine(config.caption_machine), config.images * config.caption_share
    rate = Rate(value=config.caption_rate, unit="captions", known="assumed", source="caption_rate")
    batches = ceil(config.images / config.batch_size)
    return stage("caption", machine, config.caption_machines, work, rate, config.start_seconds, batches, ceil(work))


def _encode(config: PlanConfig, flow: FlowConfig, prices: Prices, results: Path) -> Stage:
    machine = prices.machine(config.encode_machine)
    pixels = flow.grid[0] * flow.grid[1] * config.downsampling**2
    by_peak = config.encode_share_of_peak * machine.peak_tflops * 1e12 / (VAE_FLOPS_PER_PIXEL * pixels)
    if machine.gpus:
        rate = _rate(config.encode_rate, "pictures", None, "", by_peak, f"{config.encode_share_of_peak:.0%} of peak")
    else:  # measured with the demo's VAE, which says nothing of others
        file = results / "plan.json" if config.preset == "emoji" else None
        rate = _rate(config.encode_rate, "pictures", file, "encode_pictures_per_second", None)
    shards = shard_count(config, flow)
    part_objects = PART_OBJECTS + (TEXT_OBJECTS if config.text_states else 0)
    puts = shards * (_arrays(config) + 1) + ceil(shards / PART_SHARDS) * part_objects + PUBLISH_OBJECTS
    gets = config.images + 2 * shards  # a request a picture at most: neighbours come in one
    return stage("encode", machine, config.encode_machines, config.images, rate, config.start_seconds, puts, gets)


def _train(config: PlanConfig, flow: FlowConfig, seen: int, prices: Prices, results: Path) -> Stage:
    machine = prices.machine(config.train_machine)
    rate = _training_rate(config, machine, results)
    steps = seen // (config.global_batch_size or RECIPES[config.preset]["global_batch_size"])
    ranks = machine.devices * config.train_machines
    saves = ceil(steps / config.checkpoint_every)
    objects = CHECKPOINT_OBJECTS * ranks
    puts = saves * (objects * _upload_requests(CHECKPOINT_BYTES_PER_PARAMETER * parameters(flow) / objects) + 3)
    gets = ceil(max(1.0, seen / config.images)) * config.train_machines * shard_count(config, flow) * _arrays(config)
    work = seen * training_flops_seen(config, flow) / 1e12
    return stage("train", machine, config.train_machines, work, rate, config.start_seconds, puts, gets)


def shard_count(config: PlanConfig, flow: FlowConfig) -> int:
    """Shards of the snapshot; each is an object of every array."""
    return ceil(config.images / _layout(config, flow)[1])


def _layout(config: PlanConfig, flow: FlowConfig) -> tuple[int, int]:
    """Rows of a chunk and of a shard."""
    largest = max(2 * flow.channels * flow.grid[0] * flow.grid[1], 2 * config.text_states)
    return layout(config.images, largest, CHUNK_BYTES, SHARD_BYTES)


def _upload_requests(size: float) -> int:
    """Requests that store an object of `size` bytes."""
    return 1 if size <= MULTIPART_BYTES else ceil(size / MULTIPART_BYTES) + 2


def _arrays(config: PlanConfig) -> int:
    return 1 + config.posterior + bool(config.text_states)


def _training_rate(config: PlanConfig, machine: Machine, results: Path) -> Rate:
    if config.train_tflops or not machine.gpus:
        return _rate(config.train_tflops, "TFLOP", results / "plan.json", "train_tflops", None)
    measured = results / "train_step-cuda.json"
    shares = [row.get("% of peak") for row in _read(measured).get("rows", [])]
    found = max((share for share in shares if isinstance(share, int | float)), default=None)
    if found is None:
        assumed = config.train_share_of_peak * machine.peak_tflops
        return _rate(None, "TFLOP", None, "", assumed, f"{config.train_share_of_peak:.0%} of peak")
    source = f"{measured.name}: {found:.0f} % of peak on {_read(measured)['device']}"
    return Rate(value=found / 100 * machine.peak_tflops, unit="TFLOP", known="measured", source=source)


def _rate(
    given: float | None, unit: str, file: Path | None, key: str, assumed: float | None, why: str = "a guess"
) -> Rate:
    """The rate that the user gave, else the measured one, else the assumed one. Raises ConfigError without any."""
    if given:
        return Rate(value=given, unit=unit, known="given", source="the plan's own settings")
    measured = _read(file).get("rates", {}).get(key) if file else None
    if file and measured:
        return Rate(value=measured, unit=unit, known="measured", source=f"{file.name}: {_read(file)['device']}")
    if assumed is None:
        raise ConfigError(f"nobody has measured how many {unit} a CPU core does; run benchmarks/plan.py, or set it")
    return Rate(value=assumed, unit=unit, known="assumed", source=why)


def _read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def _assumptions(config: PlanConfig, stages: tuple[Stage, ...]) -> tuple[str, ...]:
    rates = (
        f"{stage.name} at {stage.rate.value:,.3g} {stage.rate.unit}/s a device ({stage.rate.source})"
        for stage in stages
        if stage.rate.known == "assumed"
    )
    left = (name for name in ("url_yield", "image_bytes", "start_seconds") if name not in config.model_fields_set)
    return (*rates, *(f"{name} {getattr(config, name):,}" for name in left))
