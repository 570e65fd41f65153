"""The train flow: its form, the command it names, how it follows a launch. Real runs: test_operations.py."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import types
from asyncio import CancelledError
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from prefect.exceptions import TerminationSignal
from prefect.utilities.callables import parameter_schema
from typer.testing import CliRunner

from infra import train_flow
from infra.launch import LaunchConfig
from infra.launch_command import launch as launch_app
from infra.train_flow import RECIPE_FIELDS, assignments, launch_command, plain, train
from starflow.config import load_config
from starflow.errors import NotFoundError, StarflowError, UnavailableError
from starflow.objectstore import LocalStore
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


def test_the_command_says_the_same_as_the_form(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Through the command line's own parser."""
    settings = plain(
        {"store": str(tmp_path), "run": "a", "steps": 7, "model": {"layers": (1, 1)}, "betas": (0.9, 0.99)}
    )
    where = LaunchConfig(on="slurm", nodes=2, ranks_per_node=4, cluster={"partition": "big one"})
    program, command, *arguments = shlex.split(launch_command(settings, where))
    assert (program, command) == ("starflow", "launch")
    submitted: list[Any] = []
    fake = types.SimpleNamespace(run="a", ranks=8, store="", model_dump=lambda mode: {})
    monkeypatch.setattr("infra.launch.submit", lambda *given: submitted.append(given) or fake)
    CliRunner().invoke(launch_app, [*arguments, "--json"], catch_exceptions=False)
    assert submitted == [(load_config(TrainConfig, None, assignments(settings)), where)]


def test_the_flow_imports_no_torch_while_it_follows(tmp_path: Path) -> None:
    """A cancellation in the middle of that import would leave nothing with which to show what was saved."""
    code = f"""
import sys
from infra.train_flow import describe_run, import_what_a_page_needs
from starflow import manifest
from starflow.objectstore import open_store
from training.record import RUN_KIND, RUN_VERSION, run_key

import_what_a_page_needs()
before = set(sys.modules)
config = {{"steps": 1, "preset": "emoji", "snapshot": "a"}}
manifest.commit(open_store({str(tmp_path)!r}), run_key("a"), RUN_KIND, RUN_VERSION, {{"config": config}})
assert describe_run({str(tmp_path)!r}, "a")["step"] is None
print([name for name in set(sys.modules) - before if name.startswith(("torch", "numpy", "matplotlib"))])
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert finished.stdout.strip() == "[]", finished.stderr


class _Launched:
    """Stands for a launch: what its log says, and how it ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lines: list[str], **end: Any) -> None:
        self.lines, self.asked, self.end = lines, 0, {"message": "", **end}
        self.logged: list[str] = []
        monkeypatch.setattr(train_flow, "LOOK_EVERY", 0.01)
        monkeypatch.setattr(train_flow, "logs", lambda launch, follow: iter(self.lines))
        monkeypatch.setattr(train_flow, "status", self.status)
        log = types.SimpleNamespace(
            info=lambda text, *values: self.logged.append(text % values if values else text),
            warning=lambda text, *values: self.logged.append(text % values),
        )
        monkeypatch.setattr(train_flow, "get_run_logger", lambda: log)

    def status(self, launch: Any) -> dict[str, Any]:
        self.asked += 1
        return self.end | {"alive": self.asked < 3}

    def flow(self, monkeypatch: pytest.MonkeyPatch, folder: Path, error: BaseException) -> list[Any]:
        """Runs the flow, which `error` ends while it follows the launch and the store is away; what it stopped."""
        stopped: list[Any] = []

        def stop(launch: Any, seconds: float) -> None:
            stopped.append(launch)
            raise UnavailableError("no answer to the request to stop")

        monkeypatch.setattr(train_flow, "stop", stop)
        monkeypatch.setattr(train_flow, "active", lambda store, run: types.SimpleNamespace(submitted="now"))
        monkeypatch.setattr(train_flow, "secrets_to_environment", lambda: None)
        monkeypatch.setattr(train_flow, "create_progress_artifact", lambda *_, **__: "id")
        monkeypatch.setattr(train_flow, "follow", lambda launch, update: _raise(error))
        with pytest.raises(type(error)):
            train.fn(store=str(folder), run="a")
        return stopped


def _raise(error: BaseException) -> Any:
    raise error


def test_the_log_is_copied_until_all_machines_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    launched, updates = _Launched(monkeypatch, ["one", "two"], state="completed"), []
    end = train_flow.follow(cast(Any, launched), lambda: updates.append(True))
    assert launched.logged == ["one", "two"]
    assert (end["state"], launched.asked) == ("completed", 3)
    assert updates


def test_a_log_out_of_reach_ends_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = _Launched(monkeypatch, [], state="completed")

    def fails(launch: Any, follow: bool) -> Iterator[str]:
        raise StarflowError("no such machine")
        yield

    monkeypatch.setattr(train_flow, "logs", fails)
    assert train_flow.follow(cast(Any, launched), lambda: None)["state"] == "completed"
    assert launched.logged == ["the log cannot be followed: no such machine"]


@pytest.mark.parametrize("away", [UnavailableError("nobody answers"), httpx.ConnectError("nobody answers")])
def test_a_store_or_a_server_out_of_reach_ends_no_training(monkeypatch: pytest.MonkeyPatch, away: Exception) -> None:
    """And is told of once as long as it lasts."""
    launched = _Launched(monkeypatch, [], state="completed")
    page: list[Exception | None] = [None, StarflowError("a damaged checkpoint"), None, *2 * [away]]
    status = launched.status

    def ask(launch: Any) -> dict[str, Any]:
        answer = status(launch)
        return _raise(away) if launched.asked < 3 else answer

    def update() -> None:
        if page and (error := page.pop()):
            raise error

    monkeypatch.setattr(train_flow, "ASK_EVERY", 0.0)
    monkeypatch.setattr(train_flow, "status", ask)
    launched.asked = -3
    end = train_flow.follow(cast(Any, launched), update)
    assert (end["state"], launched.asked) == ("completed", 3)
    assert [line.rpartition(": ")[2] for line in launched.logged] == [*2 * ["nobody answers"], "a damaged checkpoint"]


def test_a_run_that_cannot_be_read_any_more_is_followed_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = _Launched(monkeypatch, [])
    monkeypatch.setattr(train_flow, "status", lambda launch: _raise(NotFoundError("the run is gone")))
    with pytest.raises(NotFoundError, match="gone"):
        train_flow.follow(cast(Any, launched), lambda: None)


@pytest.mark.parametrize("error", [TerminationSignal(signal=15), KeyboardInterrupt(), CancelledError()])
def test_a_cancelled_flow_stops_its_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException
) -> None:
    launched = _Launched(monkeypatch, [])
    assert len(launched.flow(monkeypatch, tmp_path, error)) == 1
    assert any("no answer to the request to stop" in line for line in launched.logged)


def test_a_flow_that_fails_leaves_its_training_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not _Launched(monkeypatch, []).flow(monkeypatch, tmp_path, RuntimeError("of the page"))


@pytest.mark.parametrize("on", ["local", "ssh"])
def test_a_look_at_the_metrics_reads_only_what_is_new(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, on: Any) -> None:
    """On this machine of the file that grows, elsewhere of the one that the newest checkpoint has brought."""
    shown, read = list[str](), list[bytes]()
    monkeypatch.setattr(train_flow, "create_progress_artifact", lambda *_, **__: "id")
    monkeypatch.setattr(train_flow, "update_progress_artifact", lambda *_, description: shown.append(description))
    real = LocalStore.read
    monkeypatch.setattr(LocalStore, "read", lambda *given, **named: read.append(real(*given, **named)) or read[-1])
    config = load_config(TrainConfig, None, ["run=a"], store=str(tmp_path / "store"), cache=tmp_path / "cache")
    path = config.folder / "metrics.jsonl" if on == "local" else tmp_path / "store" / "runs" / "a" / "metrics.jsonl"
    page = train_flow.RunPage(config, LaunchConfig(on=on), "command")
    page.update()
    path.parent.mkdir(parents=True)
    for text in ("", "{}", "".join(json.dumps({"step": n, "bits_per_dim": 2.5}) + "\n" for n in range(5000)) + '{"st'):
        path.write_text(text)
        page.update()
        page.update()
    assert shown == [f"a: step 4999 of {config.steps}, 2.5 bits/dim"]
    assert sum(map(len, read)) < 20_000


if __name__ == "__main__":
    FORM.write_text(json.dumps(parameter_schema(train).model_dump_for_openapi(), indent=1) + "\n")
