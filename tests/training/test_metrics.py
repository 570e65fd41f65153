"""What is logged, where, and that a resumed run logs no step twice."""

from __future__ import annotations

import json
import sys
import types

import pytest
from PIL import Image

from starflow.errors import ConfigError
from training import metrics
from training.metrics import MetricsLog, ProgressLine, read_metrics

LINE = {"step": 3, "bits_per_dim": 1.25, "lr": 1e-3, "images_per_second": 40.0, "seconds": 0.2}


class FakeWandb(types.ModuleType):
    """Remembers what a run is told."""

    def __init__(self):
        super().__init__("wandb")
        self.started, self.logged = [], []

    def init(self, **arguments):
        self.started.append(arguments)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        pass

    def Image(self, picture):
        return picture


def test_all_writers_get_the_same_numbers_and_a_resume_adds_none_twice(make_config, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = make_config(wandb_project="project")
    log = MetricsLog(config)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 1 / step, "grad_norm": float("nan")})
    log.close()
    committed = b"".join(log.path.read_bytes().splitlines(keepends=True)[:2])
    log = MetricsLog(config, committed)  # killed after step 3, resumed from step 2
    for step in (3, 4):
        log.write({"step": step, "loss": 1 / step, "grad_norm": 1.0})
    log.picture(4, Image.new("RGB", (2, 2)))
    log.close()

    found = read_metrics(log.path.read_bytes())
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    assert found[0] == {"step": 1, "loss": 1.0, "grad_norm": None}
    events = EventAccumulator(str(config.folder / "tensorboard"))
    events.Reload()
    scalars = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert [step for step, _ in scalars] == [1, 2, 3, 4]
    assert [value for _, value in scalars] == pytest.approx([line["loss"] for line in found])
    # The same W&B run goes on: what it has already had under a step it does not take again.
    assert [(run["id"], run["resume"]) for run in fake.started] == [("test", "allow")] * 2
    assert [step for step, _ in fake.logged] == [1, 2, 3, 3, 4, 4]
    assert fake.logged[2][1]["loss"] == fake.logged[3][1]["loss"]


@pytest.mark.slow
def test_weights_and_biases_takes_it_for_real(make_config, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    log = MetricsLog(make_config(wandb_project="project"))
    log.picture(1, Image.new("RGB", (8, 8)))
    log.write({"step": 1, "loss": 1.0, "grad_norm": None})
    log.close()
    (record,) = tmp_path.glob("wandb/offline-run-*/run-test.wandb")
    assert record.stat().st_size > 0
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/samples_*.png"))


def test_a_terminal_has_one_live_line(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    line = ProgressLine(4)
    for step in (2, 3):
        line.show(LINE | {"step": step})
    line.end()
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert shown.split("\r")[-1].startswith(
        "\x1b[K[===============     ] step 3/4  1.2500 bits/dim  lr 1.00e-03  40.0 im"
    )


def test_a_log_file_has_a_plain_line_now_and_then(monkeypatch, capsys):
    printed = []
    monkeypatch.setattr(metrics.console, "print", lambda text, **_: printed.append(text))
    line = ProgressLine(4, every_seconds=1000)
    for step in (1, 2, 3, 4):
        line.show(LINE | {"step": step, "bits_per_dim": None})
    line.end()
    assert [text.split("  ")[:2] for text in printed] == [[f"step {n}/4", "no finite bits/dim"] for n in (1, 4)]
    assert capsys.readouterr().err == ""


def test_a_metrics_file_is_json_lines(make_config):
    log = MetricsLog(make_config())
    log.write({"step": 1, "loss": float("inf")})
    log.close()
    assert json.loads(log.path.read_text()) == {"step": 1, "loss": None}


def test_wandb_that_refuses_is_said_once_and_for_all(make_config, monkeypatch):
    from wandb.errors import UsageError

    class Refusing(FakeWandb):
        errors = types.SimpleNamespace(UsageError=UsageError)

        def init(self, **arguments):
            raise UsageError("No API key configured.")

    monkeypatch.setitem(sys.modules, "wandb", Refusing())
    with pytest.raises(ConfigError, match=r"wandb_project=project: No API key.*WANDB_MODE=offline"):
        MetricsLog(make_config(wandb_project="project"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"needs the package wandb"):
        MetricsLog(make_config(wandb_project="project"))
