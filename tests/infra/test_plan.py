"""The plan's arithmetic, its price table and its command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from infra.plan import VAE_FLOPS_PER_PIXEL, PlanConfig, make_plan, storage_bytes
from infra.plan_command import plan as plan_command
from starflow.errors import ConfigError
from starflow.presets import PRESETS
from starflow.prices import Prices, load_prices

NOWHERE = Path("/nonexistent")


def test_the_default_is_the_released_recipe_on_the_dated_prices() -> None:
    plan = make_plan(PlanConfig(), results=NOWHERE)
    assert plan.parameters == pytest.approx(3.8e9, rel=0.02)
    assert plan.images_seen == 500_000 * 1024
    assert [stage.name for stage in plan.stages] == ["crawl", "caption", "encode", "train"]
    assert {stage.rate.known for stage in plan.stages} == {"assumed"}  # and the plan says so
    for stage in plan.stages:
        assert any(line.startswith(stage.name) for line in plan.assumed)
    money = (
        plan.storage_dollars,
        plan.request_dollars,
        plan.gateway_dollars,
        *(stage.dollars for stage in plan.stages),
    )
    assert plan.dollars == pytest.approx(sum(money))
    assert plan.gateway_dollars == pytest.approx(700e6 * 150e3 / 1e9 * 0.045)
    assert plan.storage_bytes["latents"] == 700_000_000 * 2 * 2 * 4 * 32 * 32
    assert "2026-01-19" in plan.prices


def test_time_is_work_by_rate_and_devices_after_the_start() -> None:
    config = PlanConfig(images=7_000_000, crawl_rate=10, crawl_machines=5, start_seconds=60)
    crawl = make_plan(config, results=NOWHERE).stages[0]
    assert crawl.rate.known == "given"
    assert crawl.devices == 5 * 16
    assert crawl.hours * 3600 == pytest.approx(60 + 10_000_000 / (10 * 80))
    assert crawl.dollars == pytest.approx(crawl.hours * 5 * 0.714)


def test_twice_the_machines_cost_the_same_in_half_the_time() -> None:
    one, two = (make_plan(PlanConfig(train_machines=n, start_seconds=0), results=NOWHERE).stages[-1] for n in (8, 16))
    assert one.hours == pytest.approx(2 * two.hours)
    assert one.dollars == pytest.approx(two.dollars)


def test_a_measured_share_of_peak_is_taken_and_named(tmp_path: Path) -> None:
    rows = [{"mode": "eager", "% of peak": 40.0}, {"mode": "compiled", "% of peak": 52.0}]
    (tmp_path / "train_step-cuda.json").write_text(json.dumps({"device": "NVIDIA H200", "rows": rows}))
    rate = make_plan(PlanConfig(), results=tmp_path).stages[-1].rate
    assert rate.known == "measured"
    assert rate.value == pytest.approx(0.52 * 989)
    assert "H200" in rate.source


def test_a_cpu_needs_a_measured_rate(tmp_path: Path) -> None:
    config = PlanConfig(preset="emoji", images=4000, encode_machine="cpu", train_machine="cpu", caption_share=0)
    with pytest.raises(ConfigError, match=r"benchmarks/plan\.py"):
        make_plan(config, results=NOWHERE)
    rates = {"crawl_urls_per_second": 100, "encode_pictures_per_second": 50, "train_tflops": 0.1}
    (tmp_path / "plan.json").write_text(json.dumps({"device": "here", "rates": rates}))
    stages = make_plan(config, results=tmp_path).stages
    assert [stage.rate.value for stage in stages] == [100, 50, 0.1]
    assert {stage.rate.known for stage in stages} == {"measured"}
    assert make_plan(PlanConfig(), results=tmp_path).stages[0].rate.known == "assumed"  # the web is not loopback


def test_an_unknown_preset_and_machine_say_what_to_do() -> None:
    with pytest.raises(ConfigError, match="'imagenet-1024' does not exist; choose one of tiny"):
        make_plan(PlanConfig(preset="imagenet-1024"), results=NOWHERE)
    with pytest.raises(ConfigError, match=r"'h900'.*h100 \(p5\.48xlarge\)"):
        make_plan(PlanConfig(train_machine="h900"), results=NOWHERE)


def test_stored_text_states_outweigh_the_latents() -> None:
    flow = PRESETS["t2i-256"]
    plain = storage_bytes(PlanConfig(), flow)["latents"]
    states = storage_bytes(PlanConfig(text_states=128 * 2048), flow)["latents"]
    assert states == pytest.approx(plain + 700_000_000 * 512 * 1024)


def test_objects_and_bytes_are_those_that_a_refresh_of_120_pictures_left() -> None:
    """Counted in a store: 46 objects of the crawl in three batches, 46 of encoding and publishing, whole chunks."""
    here = dict.fromkeys(("crawl_machine", "encode_machine", "train_machine"), "cpu")
    rates = {"crawl_rate": 1.0, "encode_rate": 1.0, "train_tflops": 1.0}
    config = PlanConfig(
        preset="emoji", images=120, url_yield=1, batch_size=50, ledger_partitions=16, image_bytes=3000,
        text_states=16 * 384, caption_share=0, **here, **rates,
    )  # fmt: skip
    plan = make_plan(config, results=NOWHERE)
    assert [(stage.name, stage.puts) for stage in plan.stages[:2]] == [("crawl", 46), ("encode", 46)]
    assert plan.storage_bytes["latents"] == pytest.approx(2_097_632, rel=1e-3)
    assert plan.storage_bytes["tables"] == pytest.approx(250_925, rel=0.15)


def test_prices_are_checked(tmp_path: Path) -> None:
    prices = load_prices()
    assert prices.machine("h100") == prices.machine("p5.48xlarge")
    assert prices.machine("h100").device_hourly == pytest.approx(6.88)
    assert prices.machine("cpu").devices == 16
    file = tmp_path / "prices.yaml"
    file.write_text("region: here\n")
    with pytest.raises(ConfigError, match="machines is missing"):
        load_prices(file)
    assert Prices.model_fields["source"].is_required()  # no table without its source


def test_the_operations_of_the_vae_are_counted_not_guessed() -> None:
    from diffusers import AutoencoderKL
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )
        with FlopCounterMode(display=False) as counter:
            vae.encode(torch.empty(1, 3, 256, 256))
    assert counter.get_total_flops() / 256**2 == pytest.approx(VAE_FLOPS_PER_PIXEL, rel=0.01)


def test_the_command_prints_a_table_or_json() -> None:
    import typer

    app = typer.Typer()
    app.command()(plan_command)
    text = CliRunner().invoke(app, ["images=1000000"])
    assert text.exit_code == 0, text.output
    assert "1,000,000 pictures" in text.output
    assert "assumed" in text.output
    answer = json.loads(CliRunner().invoke(app, ["--json", "images=1000000"]).stdout)
    assert {"stages", "storage_bytes", "dollars", "hours", "assumed"} <= set(answer)
