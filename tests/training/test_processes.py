"""Processes end with the one that started them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from tests.training.run_helpers import until
from training.processes import PARENT, describe, identity, is_gone

SCRIPT = "from training.processes import die_with_parent; die_with_parent(); print('alive')"


@pytest.mark.parametrize("starter", [None, "this", "ended"])
def test_a_process_whose_starter_ended_while_it_was_importing_ends(starter):
    own = {None: {}, "this": {PARENT: str(os.getpid())}, "ended": {PARENT: "999999999"}}[starter]
    rest = {name: value for name, value in os.environ.items() if name != PARENT}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=rest | own, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == ((1, "") if starter == "ended" else (0, "alive\n"))


def test_a_killed_process_is_gone_before_its_parent_has_noticed():
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        owner = identity(process.pid)
        assert not is_gone(owner)
        process.kill()
        until(lambda: is_gone(owner), 30)


def test_people_read_who_it_is():
    assert describe(identity()) == f"process {os.getpid()} on {socket.gethostname()}"
    assert describe("somebody") == "somebody"
