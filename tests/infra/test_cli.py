"""The commands print what a shell or a program can use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from infra import cli
from infra.stack import LocalStack


def test_up_prints_a_shell_environment(stack: LocalStack, capsys: pytest.CaptureFixture[str]) -> None:
    cli.up(state_dir=stack.folder)
    lines = capsys.readouterr().out.splitlines()
    assert f"export PREFECT_API_URL={stack.state.ui}/api" in lines
    assert "export STARFLOW_STORE=s3://starflow" in lines
    assert {line.split("=")[0] for line in lines} >= {f"export {name}" for name in stack.state.env}


def test_status_as_json(stack: LocalStack, capsys: pytest.CaptureFixture[str]) -> None:
    cli.status(state_dir=stack.folder, json=True)
    answer = json.loads(capsys.readouterr().out)
    assert answer["running"] is True
    assert answer["ui"] == stack.state.ui
    assert set(answer["services"]) == {"s3", "postgres", "prefect-server", "worker"}


def test_commands_without_a_stack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.status(state_dir=tmp_path / "none")
    assert "starflow up" in capsys.readouterr().out
    cli.down(state_dir=tmp_path / "none", json=True)
    assert json.loads(capsys.readouterr().out) == {"stopped": []}


def test_bootstrap_says_what_it_did(stack: LocalStack, capsys: pytest.CaptureFixture[str]) -> None:
    cli.bootstrap(api_url=stack.state.env["PREFECT_API_URL"], store=stack.state.store, json=True)
    assert json.loads(capsys.readouterr().out)["deployments"] in ("registered", "unchanged")
