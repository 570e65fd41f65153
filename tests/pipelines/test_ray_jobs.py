"""A refresh as a Ray job: `ray job submit` to a cluster that is there already, `ray_address=auto`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from starflow.objectstore import open_store
from starflow.snapshots import load_snapshot

RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def cluster() -> Iterator[dict[str, str]]:
    """A head node with a dashboard, which takes jobs; yields the environment of its clients."""
    with tempfile.TemporaryDirectory(
        prefix="sf-ray-", ignore_cleanup_errors=True
    ) as folder:  # sockets' paths are short
        yield from start_head(Path(folder))


def start_head(folder: Path) -> Iterator[dict[str, str]]:
    """Starts a head node with its files in `folder`, and stops it at the end."""
    port = free_port()
    environment = os.environ | {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_ADDRESS": f"http://127.0.0.1:{port}",
    }
    command = [RAY, "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1",
               f"--port={free_port()}", f"--dashboard-port={port}", "--include-dashboard=true", f"--temp-dir={folder}",
               "--object-store-memory=100000000"]  # fmt: skip
    with (folder / "log").open("w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 180
        while subprocess.run([RAY, "job", "list"], env=environment, capture_output=True, check=False).returncode:
            assert time.monotonic() < deadline, (folder / "log").read_text()
            assert head.poll() is None, (folder / "log").read_text()
        yield environment
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        try:
            head.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_refresh_runs_as_a_job_on_the_cluster(cluster: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for number in range(12):
        picture = Image.linear_gradient("L").rotate(30 * number).convert("RGB").resize((40, 40))
        picture.save(tmp_path / "pictures" / f"{number}.png")
    refresh = [sys.executable, "-m", "starflow.cli", "refresh", "--urls", str(tmp_path / "pictures"),
               "--store", str(tmp_path / "store"), "source=images", "min_text=0", "text_encoder=null",
               "ray_address=auto", "actors=1", "--json"]  # fmt: skip
    answer = subprocess.run(
        [RAY, "job", "submit", "--", *refresh], env=cluster, capture_output=True, text=True, timeout=500, check=False
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "succeeded" in answer.stdout + answer.stderr
    assert load_snapshot(open_store(str(tmp_path / "store"))).counts.total == 12
