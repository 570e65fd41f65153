from __future__ import annotations

import pytest

from starflow.errors import ConfigError
from starflow.prices import load_prices
from training.estimate import memory_per_rank, time_and_cost


def test_zero_shares_memory():
    stages = [sum(memory_per_rank(1000, 4, stage, "bfloat16", "none").values()) for stage in (1, 2, 3)]
    assert stages == sorted(stages, reverse=True)
    assert memory_per_rank(1000, 4, 3, "bfloat16", "none")["weights"] == 500
    assert memory_per_rank(1000, 4, 2, "float32", "cpu")["optimizer"] == 0


def test_time_and_cost():
    assert time_and_cost(1e18, 8, None, None) == {}
    found = time_and_cost(0.4 * 100e12 * 3600 * 8, 8, 100.0, "h100")
    assert (found["hours_at_40_percent_of_peak"], found["device_hours"]) == (1.0, 8.0)
    assert found["dollars_list_price"] == pytest.approx(8 * load_prices().machine("h100").device_hourly, abs=0.01)
    assert time_and_cost(1e22, 8, None, "h100")["device_hours"] > 0
    with pytest.raises(ConfigError, match="h100"):
        time_and_cost(1e18, 8, None, "abacus")
