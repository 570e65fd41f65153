"""Work folders go with their run, or with the next one when theirs was killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.workfolder import work_folder

CHILD = """
import os, sys
from pipelines.workfolder import work_folder
with work_folder() as folder:
    (folder / "much").write_text("x")
    print(folder, flush=True)
    sys.stdin.read(1)
    os.kill(os.getpid(), 9)
"""


def test_what_a_killed_run_has_left_goes_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", CHILD]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=environment) as other:
        assert other.stdout is not None
        folder = Path(other.stdout.readline().strip())
        assert folder.parent == tmp_path
        os.utime(folder, (0, 0))
        with work_folder():
            assert (folder / "much").exists()  # its run is alive
        other.communicate("x")
    os.utime(folder)
    with work_folder():
        assert folder.exists()  # too young to tell
    os.utime(folder, (0, 0))
    with work_folder() as own:
        assert list(tmp_path.iterdir()) == [own]
    assert not list(tmp_path.iterdir())
