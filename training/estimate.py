"""What a run will take, before it starts: memory on each rank, time, dollars."""

from __future__ import annotations

from collections.abc import Mapping

from starflow.prices import load_prices

#: Share of the peak that training reaches on a well-fed GPU; a planning figure, not a measurement.
SHARE_OF_PEAK = 0.4


def memory_per_rank(parameters: int, ranks: int, zero_stage: int, precision: str, offload: str) -> Mapping[str, float]:
    """Bytes of weights, gradients, optimizer (masters and two moments) and average on one rank, activations aside.

    After "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (arXiv 1910.02054), table 1.
    """
    size = 2 if precision == "bfloat16" else 4
    weights = size * parameters / (ranks if zero_stage == 3 else 1)
    gradients = size * parameters / (ranks if zero_stage >= 2 else 1)
    share = parameters / (ranks if zero_stage >= 1 else 1)
    masters = 4 * share if zero_stage >= 1 else 0.0
    optimizer = 0.0 if offload != "none" else masters + 8 * share
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer, "average": 4 * parameters / ranks}


def time_and_cost(flops: float, ranks: int, peak_tflops: float | None, machine: str | None) -> dict[str, float]:
    """Hours, device hours and dollars of `flops` on `ranks` devices; empty without a peak to reckon with.

    machine: kind of machine in the price table, whose peak counts unless `peak_tflops` is given. Raises ConfigError
    for an unknown one.
    """
    priced = load_prices().machine(machine) if machine else None
    peak = peak_tflops or (priced.peak_tflops if priced else 0.0)
    if not peak:
        return {}
    hours = flops / (SHARE_OF_PEAK * peak * 1e12 * ranks) / 3600
    found = {"hours_at_40_percent_of_peak": round(hours, 2), "device_hours": round(hours * ranks, 1)}
    if priced:
        found["dollars_list_price"] = round(hours * ranks * priced.device_hourly, 2)
    return found
