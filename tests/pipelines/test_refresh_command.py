"""What the command says while it works."""

from __future__ import annotations

import pytest

from pipelines.refresh_command import SAY_EVERY, StageBars


def test_a_log_says_when_a_stage_begins_and_from_time_to_time_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("pipelines.refresh_command.time.monotonic", lambda: now[0])
    with StageBars() as bars:
        bars.on_event({"event": "stage", "stage": "encode", "state": "started"})
        for done in range(4):
            bars.on_event({"event": "progress", "stage": "encode", "done": done, "total": 4})
            now[0] += SAY_EVERY / 2
        done = {"event": "stage", "stage": "encode", "state": "done", "seconds": 2.0, "counts": {"parts": 1}}
        bars.on_event(done)
    lines = [line.strip() for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert lines[:2] == ["encode begins", "encode: 2 of 4"]
    assert lines[-1].startswith("encode")
    assert lines[-1].endswith("2.0 s  parts 1")
