"""What `pyproject.toml`, the constraints and the table of commands promise each other."""

from __future__ import annotations

import importlib
import re
import tomllib
from pathlib import Path

import pytest

from starflow.cli import COMMANDS

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pinned() -> dict[str, str]:
    lines = (line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#")
    return dict(line.split("==") for line in lines)


def test_every_dependency_is_pinned_within_its_bounds() -> None:
    from packaging.requirements import Requirement

    versions = pinned()
    requirements = [*PROJECT["dependencies"]]
    for extra in PROJECT["optional-dependencies"].values():
        requirements += extra
    for text in requirements:
        requirement = Requirement(text)
        if requirement.name != PROJECT["name"]:
            assert requirement.specifier.contains(versions[requirement.name]), text


def test_every_dependency_has_its_reason() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    block = text[text.index("dependencies = [") : text.index("dev = [")]
    for line in block.splitlines():
        if re.match(r'\s+"', line):
            assert "#" in line, f"no reason beside {line.strip()}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_can_be_loaded(name: str) -> None:
    module, attribute, help = COMMANDS[name]
    assert callable(getattr(importlib.import_module(module), attribute))
    assert help.endswith(".")
