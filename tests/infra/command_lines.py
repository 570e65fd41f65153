"""Whether command lines that people or machines are told to type exist, with those options."""

from __future__ import annotations

import importlib
import re
import shlex

import typer

from starflow.cli import COMMANDS


def check_command(line: str, where: str) -> None:
    """Fails unless the `starflow` command of a line of shell exists and knows its options."""
    words = shlex.split(re.sub(r'^eval "\$\((.*)\)"', r"\1", line), comments=True)
    module, attribute, _ = COMMANDS[words[1]]
    target = getattr(importlib.import_module(module), attribute)
    if not isinstance(target, typer.Typer):
        function, target = target, typer.Typer(add_completion=False)
        target.command(name=words[1])(function)
    command, rest = typer.main.get_command(target), words[2:]
    if hasattr(command, "commands"):
        if rest and not rest[0].startswith("-") and rest[0] in command.commands:
            command, rest = command.commands[rest[0]], rest[1:]
        elif words[1] == "launch":
            command = command.commands["submit"]
        else:
            assert getattr(command, "invoke_without_command", False), f"{where}: {line}"
    known = {option for parameter in command.params for option in [*parameter.opts, *parameter.secondary_opts]}
    for word in rest:
        if word.startswith("--"):
            assert word.partition("=")[0] in known | {"--help"}, f"{where}: {line}"
