"""Aspect ratios: parsed, and refused while the configuration is read."""

from __future__ import annotations

import pytest

from pipelines.aspect import parse_aspect_ratio
from pipelines.config import RefreshConfig
from pipelines.encode_plan import EncodeConfig
from starflow.config import Config, load_config
from starflow.errors import ConfigError


def test_width_by_height() -> None:
    assert parse_aspect_ratio("3:2") == 1.5
    for wrong in ("square", "3", "0:1", "3:-2", "1.5:1", "3:2:1", "\u00b2:1", 61):
        with pytest.raises(ValueError, match="not WIDTH:HEIGHT"):
            parse_aspect_ratio(wrong)


@pytest.mark.parametrize("model", [RefreshConfig, EncodeConfig])
@pytest.mark.parametrize("wrong", ["['1:1', wide]", "[1:1]"])  # without quotes YAML reads 61
def test_bad_ratios_are_refused_with_the_configuration(model: type[Config], wrong: str) -> None:
    required = {"urls": "-", "store": "-"} if model is RefreshConfig else {}
    with pytest.raises(ConfigError, match=r"aspect_ratios\.\d = .*not WIDTH:HEIGHT"):
        load_config(model, None, [f"aspect_ratios={wrong}"], **required)
