"""The train flow: its form, the child it launches, and what it says of it. Training itself is tested elsewhere."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from prefect.utilities.callables import parameter_schema

from infra.flows import RECIPE_FIELDS, child, own_error, plain, resume_command, train
from infra.processes import ProcessRef, wait_until
from starflow.config import load_config
from training.config import TrainConfig

FORM = Path(__file__).with_name("train_form.json")


def test_form_has_not_changed_unnoticed() -> None:
    """After a wanted change: `python tests/infra/test_train_flow.py` rewrites the snapshot."""
    assert parameter_schema(train).model_dump_for_openapi() == json.loads(FORM.read_text())


def test_form_leaves_to_the_preset_what_its_recipe_knows() -> None:
    schema = parameter_schema(train)
    assert schema.required == ["store", "run"]
    assert {name for name, field in schema.properties.items() if field.get("default", 0) is None} >= RECIPE_FIELDS
    assert all(field["title"] and field["description"] for field in schema.properties.values())


def test_resume_command_gives_the_same_configuration(tmp_path: Path) -> None:
    settings = plain(
        {"store": str(tmp_path), "run": "it's", "steps": 7, "model": {"layers": (1, 1)}, "betas": (0.9, 0.99)}
    )
    program, command, *overrides = shlex.split(resume_command(settings))
    assert (program, command) == ("starflow", "train")
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump(settings | {"run": "a"}))
    assert load_config(TrainConfig, None, [*overrides, "run=a"]) == load_config(TrainConfig, file)


def test_own_error_is_the_last_sentence() -> None:
    assert own_error(["step 1", "error: no such snapshot", "bye"]) == "no such snapshot"
    assert own_error(["step 1", "run a: giving up", ""]) == "run a: giving up"
    assert own_error([]) == ""


def test_output_arrives_line_by_line_and_ends() -> None:
    with child([sys.executable, "-c", "print('one'); print('two')"]) as (process, lines):
        assert [lines.get(timeout=30) for _ in range(3)] == ["one", "two", None]
    assert process.returncode == 0


def test_cancelled_child_leaves_no_process_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child and its own child, in another session, both ignore the request to stop."""
    monkeypatch.setattr("infra.flows.SAVE_SECONDS", 0.3)
    stubborn = "trap '' TERM; setsid bash -c 'trap \"\" TERM; echo $$; while true; do sleep 0.05; done'; true"
    grandchild = []

    def cancelled() -> None:
        with child(["bash", "-c", stubborn]) as (_, lines):
            pid = int(lines.get(timeout=30) or 0)
            grandchild.append(ProcessRef(pid=pid, created=psutil.Process(pid).create_time()))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cancelled()
    assert wait_until(lambda: not grandchild[0].alive, seconds=5)


def test_child_may_save_before_it_ends() -> None:
    saves = "trap 'echo saved; exit 75' TERM; echo ready; while true; do sleep 0.05; done"
    with child(["bash", "-c", saves]) as (process, lines):
        assert lines.get(timeout=30) == "ready"
    assert process.returncode == 75
    assert lines.get(timeout=5) == "saved"


if __name__ == "__main__":
    FORM.write_text(json.dumps(parameter_schema(train).model_dump_for_openapi(), indent=1) + "\n")
