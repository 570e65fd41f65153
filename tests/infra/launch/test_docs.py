"""docs/training.md: its commands as they are written, on the real stack and a smaller model; its settings files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from infra.launch import LaunchConfig, active, newest, status, stop
from infra.launch.api import launcher
from infra.processes import wait_until
from starflow.objectstore import open_store
from tests.training.run_helpers import lines
from tests.training.small_snapshot import publish_samples

PAGE = Path(__file__).parents[3] / "docs/training.md"
BLOCKS = {
    (language, title): text
    for language, title, text in re.findall(r'^```(\w+) title="([^"]+)"\n(.*?)^```', PAGE.read_text(), re.S | re.M)
}
#: A hundred steps take seconds on a machine without a GPU.
SMALLER = "preset: tiny\nmodel: {width: 64, layers: [1, 1], text_length: 0, text_width: 0}\ntext_encoder: null\n"


@pytest.mark.parametrize("target", ["ssh", "slurm", "kubernetes", "ray"])
def test_settings_files_are_valid(target: str) -> None:
    settings = yaml.safe_load(BLOCKS["yaml", f"{target}.yaml"])
    launcher(LaunchConfig.model_validate({"on": target, "nodes": 2, "gpus_per_node": 8, "cluster": settings}))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_commands_work(s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_samples(open_store(s3_url))
    config = BLOCKS["yaml", "train.yaml"].replace("s3://starflow", s3_url).replace("preset: emoji\n", SMALLER)
    (tmp_path / "train.yaml").write_text(
        f"{config}cache: {tmp_path}/cache\nvalidation_every: 1500\nlease_seconds: 10\n"
    )
    monkeypatch.setenv("STARFLOW_STORE", s3_url)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")

    def run(number: int) -> str:
        command = ["bash", "-euo", "pipefail", "-c", BLOCKS["sh", str(number)]]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def committed() -> int:
        return status(newest(s3_url, "emoji-1"))["step"] or 0

    try:
        assert "store_writable: true" in run(1)
        assert run(2).startswith("emoji-1\n")
        assert wait_until(lambda: committed() >= 50, seconds=200)
        assert "emoji-1: interrupted" in run(3)
        run(4)
        reached = committed()
        assert wait_until(lambda: committed() > reached, seconds=200)
        assert "resuming from step" in run(5)
        assert "emoji-1: completed, saved up to step 1500 of 1500, 1 rank\n" in run(6)
    finally:
        if launch := active(s3_url, "emoji-1"):
            stop(launch, 0)
    assert [line["step"] for line in lines(open_store(s3_url), "emoji-1")] == list(range(1, 1501))
