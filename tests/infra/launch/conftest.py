"""Launches of harmless commands, and of the tiny preset on a small snapshot."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.launch import Launch, LaunchConfig
from tests.training.conftest import make_config, one_thread, store  # noqa: F401


@pytest.fixture
def make_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Launch]:
    """A launch that is not submitted yet; keyword arguments are those of LaunchConfig."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))

    def make(*command: str, in_store: str = "", **config: object) -> Launch:
        launch = LaunchConfig.model_validate(config)
        return Launch(
            id="20260102T030405-0123abcd",
            run="my.Run",
            store=in_store or str(tmp_path / "store"),
            submitted="2026-01-02T03:04:05.000+00:00",
            launch=launch,
            ranks=launch.nodes,
            command=command or ("python", "-m", "starflow.cli", "train", "--config", "s3://b/config.json"),
            handle={},
        )

    return make


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a program of that name, a Python script, before all others; ARGV and STDIN are what it was given.

    Each call is noted as a line of ``NAME.calls`` in the test's folder.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def make(name: str, source: str) -> None:
        program = folder / name
        program.write_text(
            f"#!{sys.executable}\nimport json, os, sys, subprocess\nfrom pathlib import Path\n"
            f"ARGV, HERE = sys.argv[1:], Path({str(tmp_path)!r})\n"
            f"with open(HERE / '{name}.calls', 'a') as calls: calls.write(json.dumps(ARGV) + '\\n')\n{source}\n"
        )
        program.chmod(0o755)

    return make
