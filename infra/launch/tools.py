"""Calling the programs of a cluster: sbatch, squeue, scancel, kubectl."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence

from starflow.errors import StarflowError

#: Seconds that a program may take to answer.
ANSWER_SECONDS = 60


def call(command: Sequence[str], given: str = "") -> str:
    """Output of `command`, which reads `given`. Raises StarflowError with what it said."""
    try:
        result = subprocess.run(command, input=given, capture_output=True, text=True, timeout=ANSWER_SECONDS)
    except FileNotFoundError as error:
        raise StarflowError(f"{command[0]} is not installed here; launch from a machine that has it") from error
    except subprocess.TimeoutExpired as error:
        raise StarflowError(
            f"{shlex.join(command)} gave no answer within {ANSWER_SECONDS} s; try it by hand"
        ) from error
    if result.returncode:
        said = " ".join(result.stderr.split()) or f"exit status {result.returncode}"
        raise StarflowError(f"{shlex.join(command)} failed: {said}")
    return result.stdout
