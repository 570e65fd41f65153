"""The `starflow` command: a table from sub-command to the function that runs it, imported on use.

This table is the only place where `starflow` names its sibling packages. Each entry points at a function
(one command) or a Typer app (a group of commands) in a package's own command module.
"""

from __future__ import annotations

import errno
import importlib
import sys
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from starflow.errors import REINSTALL, UNAVAILABLE_STATUS, StarflowError, UnavailableError

#: Errors of the operating system that speak of a folder, not of a bug.
STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR}

#: sub-command: (module, attribute, one line of help); the order is the order of `starflow --help`.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "demo": ("infra.cli", "demo", "Run the whole way once on this machine, from URLs to pictures."),
    "doctor": ("infra.cli", "doctor", "Say what this machine lacks and how to get it."),
    "up": ("infra.cli", "up", "Start the local stack: S3, Prefect server and worker."),
    "down": ("infra.cli", "down", "Stop the local stack."),
    "status": ("infra.cli", "status", "Show the local stack."),
    "prefect": ("infra.cli", "prefect", "Register the deployments on a Prefect server."),
    "refresh": ("pipelines.cli", "refresh", "Crawl, caption, filter, encode and publish a snapshot."),
    "recaption": ("pipelines.recaption_command", "recaption", "Publish a snapshot with new captions."),
    "snapshots": ("pipelines.snapshots_cli", "snapshots", "List, show, compare and check published snapshots."),
    "preview": ("pipelines.snapshots_cli", "preview", "Decode a few samples of a snapshot back to pictures."),
    "takedown": ("pipelines.snapshots_cli", "takedown", "Publish a snapshot without some samples, for good."),
    "plan": ("infra.plan_command", "plan", "Hours, dollars and storage of a data set and a model."),
    "cluster": ("infra.cluster.command", "cluster", "Render container, Kubernetes, Ray and Terraform files."),
    "train": ("training.cli", "train", "Train a run, or resume it where it stopped."),
    "launch": ("infra.launch_command", "launch", "Train on this machine, over ssh, on Slurm, Kubernetes or Ray."),
    "train-vae": ("training.vae_cli", "train_vae", "Train a small VAE on a folder of pictures."),
    "finetune-decoder": ("training.decoder_cli", "finetune_decoder", "Teach a VAE's decoder to decode noisy latents."),
    "runs": ("training.cli", "runs", "List, show and compare training runs."),
    "checkpoints": ("training.cli", "checkpoints", "List, show, verify and export checkpoints."),
    "sample": ("starflow.commands", "sample", "Draw pictures for prompts."),
    "score": ("starflow.commands", "score", "Exact log-likelihood of images given captions."),
    "encode": ("starflow.commands", "encode", "Image to noise."),
    "decode": ("starflow.commands", "decode", "Noise to image."),
    "interpolate": ("starflow.commands", "interpolate", "Pictures between two images, in noise space."),
    "inpaint": ("starflow.commands", "inpaint", "Fill in the masked part of an image."),
    "typicality": ("starflow.commands", "typicality", "Find images that are unlikely for a reference set."),
    "model": ("starflow.commands", "model", "Describe the model presets."),
    "import": ("starflow.commands", "import_", "Convert Apple's released weights to safetensors."),
    "export": ("starflow.commands", "export", "Write weights in Apple's released layout."),
    "verify": ("starflow.commands", "verify", "Compare this implementation with reference vectors."),
}


class LazyCommand(TyperCommand):
    """Knows its name and help; imports the module behind it when it is run."""

    def __init__(self, name: str, module: str, attribute: str, help: str) -> None:
        super().__init__(name, help=help, short_help=help, add_help_option=False)
        self.module, self.attribute = module, attribute

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        target = getattr(importlib.import_module(self.module), self.attribute)
        if not isinstance(target, typer.Typer):
            function, target = target, typer.Typer(add_completion=False)
            target.command(name=self.name, help=function.__doc__)(function)
        command = typer.main.get_command(target)
        command.name = self.name
        return command.make_context(info_name, args, parent=parent, **extra)


class LazyGroup(TyperGroup):
    """Lists the table without importing what it points at."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return LazyCommand(cmd_name, *COMMANDS[cmd_name]) if cmd_name in COMMANDS else None


app = typer.Typer(cls=LazyGroup, add_completion=False, no_args_is_help=True, rich_markup_mode="rich")


def _print_version(wanted: bool) -> None:
    if wanted:
        from starflow import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Show the version."),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    """From a list of image URLs to a trained text-to-image STARFlow."""


def main() -> NoReturn:
    """Entry point: exit code 0 only on success, one sentence instead of a traceback unless --debug."""
    debug = "--debug" in sys.argv
    sys.argv = [sys.argv[0], *(argument for argument in sys.argv[1:] if argument != "--debug")]
    try:
        app()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        print(f"error: {_explain(error)}", file=sys.stderr)
        sys.exit(UNAVAILABLE_STATUS if isinstance(error, UnavailableError) else 1)
    sys.exit(1)


def _explain(error: Exception) -> str:
    """One sentence for an error that ends a command."""
    if isinstance(error, StarflowError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"package {error.name} is missing; {REINSTALL}"
    if isinstance(error, OSError) and error.errno in STORAGE_ERRORS:
        return f"{error.strerror}: {error.filename or 'a file'}; free space, mend permissions or choose another folder"
    return f"{type(error).__name__}: {' '.join(str(error).split())} (run with --debug for the traceback)"


if __name__ == "__main__":
    main()
