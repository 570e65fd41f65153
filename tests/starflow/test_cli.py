"""What the command line says when something is wrong: one sentence with the remedy, exit code 1."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run(*arguments: str, code: str = "from starflow.cli import main; main()") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def test_a_missing_package_is_named_with_its_remedy() -> None:
    hidden = "import sys; sys.modules['torch'] = None; from starflow.cli import main; main()"
    result = run("verify", "nothing", code=hidden)
    assert result.returncode == 1
    assert result.stderr.strip() == (
        "error: package torch is missing; install it with: pip install -c constraints.txt -e '.[demo]'"
    )


def test_a_picture_needs_a_picture_name() -> None:
    result = run("sample", "a cat", "--checkpoint", "store/run", "--out", "a.xyz")
    assert result.returncode == 1
    assert "a.xyz: .xyz is not a picture format; write PICTURE.png" in result.stderr


@pytest.mark.parametrize("debug", [False, True])
def test_only_debug_shows_the_traceback(tmp_path: Path, debug: bool) -> None:
    result = run("verify", str(tmp_path / "nothing"), *(["--debug"] if debug else []))
    assert result.returncode == 1
    assert ("Traceback" in result.stderr) == debug
    assert debug or result.stderr.startswith("error: ")


def test_storage_errors_name_the_file() -> None:
    code = "import starflow.cli as c; print(c._explain(OSError(28, 'No space left on device', '/x/y')))"
    assert run(code=code).stdout.startswith("No space left on device: /x/y; free space")


def test_a_store_that_does_not_answer_has_a_status_of_its_own() -> None:
    code = (
        "import starflow.s3store as s3store; s3store.FIRST_DEADLINE_SECONDS = 0.0; "
        "from starflow.cli import main; main()"
    )
    away = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_REGION": "x"}
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    command = [sys.executable, "-c", code, "snapshots", "list", "--store", "s3://bucket"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, env=os.environ | away | keys)
    assert result.returncode == 74
    assert "check that the endpoint http://127.0.0.1:9 is up" in result.stderr
