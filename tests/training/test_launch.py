"""The files through which a supervisor and its workers talk."""

from __future__ import annotations

import threading

from tests.training.run_helpers import until
from training.launch import Heart, read_heartbeats


def test_a_heart_beats_by_itself_only_as_long_as_it_is_told_to(tmp_path):
    heart = Heart(tmp_path, 0)
    with heart.beating():
        for _ in range(2):
            before = read_heartbeats(tmp_path)
            until(lambda before=before: read_heartbeats(tmp_path) != before, 30)
    assert "heart" not in [thread.name for thread in threading.enumerate()]
