"""Calling the programs of a cluster: sbatch, squeue, scancel, kubectl."""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Sequence

from starflow.errors import StarflowError

#: Seconds that a program may take to answer.
ANSWER_SECONDS = 60


def call(command: Sequence[str], given: str = "") -> str:
    """Output of `command`, which reads `given`. Raises StarflowError with what it said."""
    try:
        result = subprocess.run(command, input=given, capture_output=True, text=True, timeout=ANSWER_SECONDS)
    except FileNotFoundError as error:
        raise _not_installed(command) from error
    except subprocess.TimeoutExpired as error:
        raise StarflowError(
            f"{shlex.join(command)} gave no answer within {ANSWER_SECONDS} s; try it by hand"
        ) from error
    if result.returncode:
        raise _failed(command, result.stderr, result.returncode)
    return result.stdout


def lines_of(command: Sequence[str], given: str = "") -> Iterator[str]:
    """Lines of `command`, which reads `given`, as they come; it ends with whoever reads them.

    Raises StarflowError with what it said if it fails.
    """
    with tempfile.TemporaryFile("w+") as told, tempfile.TemporaryFile("w+", errors="replace") as said:
        told.write(given)
        told.seek(0)
        try:
            process = subprocess.Popen(command, stdin=told, stdout=subprocess.PIPE, stderr=said)
        except FileNotFoundError as error:
            raise _not_installed(command) from error
        with process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    yield line.decode(errors="replace").rstrip("\n")
                process.wait(ANSWER_SECONDS)
            finally:
                process.kill()
        if process.returncode:
            said.seek(0)
            raise _failed(command, said.read(), process.returncode)


def _not_installed(command: Sequence[str]) -> StarflowError:
    return StarflowError(f"{command[0]} is not installed here; do this on a machine that has it")


def _failed(command: Sequence[str], said: str, status: int) -> StarflowError:
    return StarflowError(f"{shlex.join(command)} failed: {' '.join(said.split()) or f'exit status {status}'}")
