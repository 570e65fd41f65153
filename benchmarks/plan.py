"""Predictions of `starflow plan` against small real runs: a refresh (crawl, encode) and a training run.

Two refreshes of different size and a short run of the demo's model give this machine's rates and starting times.
From them the plan predicts a larger refresh and a run of a larger model with another batch size; both are then done
for real, with the commands that users type, and compared: seconds, bytes and objects.

    python benchmarks/plan.py                     # about four minutes on two cores

Writes benchmarks/results/plan.md and plan.json, whose rates `starflow plan` takes for machines without GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml
from train_step import machine, write

from infra.demo.web import start_web
from infra.plan import Plan, PlanConfig, make_plan, training_flops_seen
from starflow.model import FlowConfig
from starflow.objectstore import open_store
from starflow.presets import PRESETS
from starflow.prices import Prices

#: Steps whose times do not count: the first ones warm up.
WARM = 5
LARGER = {"width": 256, "layers": [2, 2, 6]}


def starflow(*arguments: str) -> dict[str, Any]:
    """Runs the command as a user would; returns its JSON and the seconds it took."""
    started = time.monotonic()
    command = [sys.executable, "-m", "starflow.cli", *arguments, "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return {**json.loads(done.stdout), "wall": time.monotonic() - started}


def refresh(web: Any, folder: Path, count: int, actors: int) -> dict[str, Any]:
    """A refresh of `count` pictures into an empty store: seconds of its stages, objects and bytes by kind."""
    store, urls = folder / f"store-{count}", folder / f"{count}.parquet"
    pq.write_table(pq.read_table(web.lists[0]).slice(0, count), urls)
    host = web.address.removeprefix("http://")
    settings = [f"allow_host=[{host}]", "aspect_ratios=['1:1']", "image_size=32", "patch=2", f"actors={actors}"]
    answer = starflow("refresh", "--urls", str(urls), "--store", str(store), *settings)
    return {**answer, **stored(store), "store": str(store)}


def stored(store: Path) -> dict[str, Any]:
    """Objects and bytes by the first folder of their keys; originals are the crawl's tars."""
    objects, sizes = Counter[str](), Counter[str]()
    for each in open_store(str(store)).list(""):
        kind, arrays = each.key.split("/")[0], "/c/" in each.key
        # What encoding and publishing write lies in three folders.
        objects["crawl" if kind == "crawl" and "/encode/" not in each.key else "encode"] += 1
        sizes["originals" if each.key.endswith(".tar") else "latents" if arrays else kind] += each.size
    return {"objects": dict(objects), "bytes": dict(sizes)}


def train(store: str, cache: Path, run: str, ranks: int, **settings: Any) -> dict[str, Any]:
    """A training run to its end: median seconds of a step, and everything else as starting time."""
    file = cache / f"{run}.yaml"
    file.write_text(yaml.safe_dump({"store": store, "run": run, "ranks": ranks, "cache": str(cache), **settings}))
    answer = starflow("train", "--config", str(file))
    lines = [json.loads(line) for line in Path(answer["metrics"]).read_text().splitlines()]
    seconds = [line["seconds"] for line in lines][WARM:]
    step = statistics.median(seconds)
    return {"step": step, "start": answer["wall"] - step * len(lines), "wall": answer["wall"], "steps": len(lines)}


def line_through(small: float, large: float, first: int, second: int) -> tuple[float, float]:
    """(seconds to start, units a second) of a stage that took so long for two amounts of work."""
    rate = (second - first) / max(large - small, 1e-3)
    return max(0.0, small - first / rate), rate


def flops(config: FlowConfig) -> float:
    """Operations of a sample with stored text states."""
    return training_flops_seen(PlanConfig(text_states=1), config)


def compare(name: str, unit: str, predicted: float, measured: float) -> dict[str, Any]:
    """A line of the table."""
    error = 100 * (predicted / measured - 1)
    return {"what": name, "unit": unit, "predicted": predicted, "measured": measured, "error, %": round(error, 1)}


def measure(folder: Path, options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The comparison, and this machine's rates a core."""
    cores, counts = options.ranks, options.pictures
    web = start_web(folder / "web", hazard_every=10**9)
    try:
        small, middle, large = (refresh(web, folder, count, cores) for count in counts)
    finally:
        web.stop()
    first = train(large["store"], folder, "small", cores, preset="emoji", steps=options.steps, checkpoint_every=1000)
    second = train(large["store"], folder, "large", cores, preset="emoji", model=LARGER, global_batch_size=64,
                   steps=options.steps, checkpoint_every=1000)  # fmt: skip

    rows, rates = [], {}
    for stage, key in (("crawl", "crawl_urls_per_second"), ("encode", "encode_pictures_per_second")):
        start, rate = line_through(small["seconds"][stage], middle["seconds"][stage], counts[0], counts[1])
        rates[key] = rate / cores
        plan = plan_of(options, counts[2], start, **{f"{stage}_rate": rate / cores})
        predicted = next(each for each in plan.stages if each.name == stage).hours * 3600
        rows.append(compare(f"{stage} {counts[2]:,} pictures", "s", predicted, large["seconds"][stage]))
    emoji = PRESETS["emoji"]
    rates["train_tflops"] = flops(emoji) * 32 / first["step"] / cores / 1e12
    larger = FlowConfig(**{**emoji.to_dict(), **LARGER, "layers": tuple(LARGER["layers"])})
    predicted = flops(larger) * 64 / (rates["train_tflops"] * cores * 1e12)
    rows.append(compare("a step of the larger model", "s", predicted, second["step"]))
    rows.append(compare("training it, start to end", "s", first["start"] + predicted * second["steps"], second["wall"]))
    image_bytes = round(large["bytes"]["originals"] / counts[2])
    plan = plan_of(options, counts[2], 0.0, image_bytes=image_bytes, crawl_rate=1.0, encode_rate=1.0)
    kept = large["bytes"]
    rows.append(compare("latents and text states", "bytes", plan.storage_bytes["latents"], kept["latents"]))
    tables = kept.get("crawl", 0) + kept.get("parts", 0)
    rows.append(compare("tables and ledger", "bytes", plan.storage_bytes["tables"], tables))
    checkpoint = sum(each.size for each in open_store(large["store"]).list("runs/small/shards"))
    rows.append(compare("a checkpoint", "bytes", plan.storage_bytes["checkpoints"], checkpoint))
    by_name = {stage.name: stage.puts for stage in plan.stages}
    rows.append(compare("objects of the crawl", "objects", by_name["crawl"], large["objects"]["crawl"]))
    rows.append(compare("objects of encoding and publishing", "objects", by_name["encode"], large["objects"]["encode"]))
    return rows, rates


def plan_of(options: argparse.Namespace, images: int, start: float, **settings: Any) -> Plan:
    """The plan of a refresh like the ones measured, on this machine, for nothing."""
    free = {"gigabyte_month": 0, "put_thousand": 0, "get_thousand": 0}
    here = {"name": "here", "instance": "this machine", "gpus": 0, "cpus": options.ranks, "hourly": 0}
    prices = {"region": "here", "date": "2000-01-01", "source": "none", "machines": [here], "storage": free}
    emoji = PRESETS["emoji"]
    config: dict[str, Any] = {
        "preset": "emoji",
        "images": images,
        "url_yield": 1.0,
        "downsampling": 2,
        "text_states": emoji.text_length * emoji.text_width,
        "caption_share": 0.0,
        "ledger_partitions": 16,
        "checkpoints_kept": 1,
        "start_seconds": start,
        "crawl_rate": 1.0,
        "encode_rate": 1.0,
        "train_tflops": 1.0,
    }
    for stage in ("crawl", "encode", "train"):
        config |= {f"{stage}_machine": "here", f"{stage}_machines": 1}
    return make_plan(
        PlanConfig.model_validate(config | settings), Prices.model_validate(prices | {"gateway_gigabyte": 0})
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, nargs=3, default=[400, 1600, 4000], help="of the three refreshes")
    parser.add_argument("--steps", type=int, default=40, help="of the two training runs")
    parser.add_argument("--ranks", type=int, default=min(2, os.cpu_count() or 1), help="actors and ranks")
    options = parser.parse_args()
    about = machine("cpu")
    with tempfile.TemporaryDirectory(prefix="starflow-plan-") as folder:
        rows, rates = measure(Path(folder), options)
    about["load at the end"] = f"{os.getloadavg()[0]:.1f}"
    about["measured with"] = "python benchmarks/plan.py"
    write("plan", "Plan: predicted from smaller runs, then measured", {**about, "rates": rates}, rows)


if __name__ == "__main__":
    main()
