"""Pages of the site that are made from the code when it is built: commands, settings, examples, measurements."""

from __future__ import annotations

import importlib
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click

from starflow.cli import COMMANDS

ROOT = Path(__file__).parent.parent
#: Settings models by the command or form that takes them.
SETTINGS = {
    "starflow refresh": "pipelines.config.RefreshConfig",
    "backfill in Prefect": "pipelines.deployment.BackfillConfig",
    "cleanup in Prefect": "infra.cleanup.CleanupConfig",
    "inspect in Prefect": "infra.upkeep_flows.InspectConfig",
    "takedown in Prefect": "pipelines.takedown.TakedownConfig",
    "starflow recaption": "pipelines.recaption.RecaptionConfig",
    "starflow train": "training.config.TrainConfig",
    "starflow launch": "infra.launch.common.LaunchConfig",
    "launch on ssh": "infra.launch.hosts.SshSettings",
    "launch on slurm": "infra.launch.slurm.SlurmSettings",
    "launch on kubernetes": "infra.launch.kubernetes.KubernetesSettings",
    "launch on ray": "infra.launch.ray.RaySettings",
    "starflow train-vae": "training.vae.VAETrainConfig",
    "starflow finetune-decoder": "training.decoder.DecoderConfig",
    "starflow plan": "infra.plan.PlanConfig",
    "starflow cluster render": "infra.cluster.settings.ClusterSettings",
    "a group of machines": "infra.cluster.settings.NodeGroup",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages; mkdocs calls it."""
    pages = {
        "reference/cli.md": commands(),
        "reference/settings.md": settings(),
        "reference/examples.md": examples(),
        "reference/measurements.md": measurements(),
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def commands() -> str:
    """Every command and option, as the command line itself describes them."""
    parts = ["# Commands\n\nMade from the command line's own help.\n"]
    for name, (module, attribute, _) in COMMANDS.items():
        target = getattr(importlib.import_module(module), attribute)
        if not isinstance(target, typer.Typer):
            function, target = target, typer.Typer(add_completion=False)
            target.command(name=name, help=function.__doc__)(function)
        command = typer.main.get_command(target)
        context = typer.Context(command, info_name=name)
        parts.append(get_docs_for_click(obj=command, ctx=context, name=name, call_prefix="starflow", indent=1))
    return re.sub(r"^\* `", "- `", "\n".join(parts), flags=re.M)


def settings() -> str:
    """Tables of the configuration models."""
    parts = [
        "# Settings\n\nKeys of the YAML files and of `key=value` on the command line. The same models are the forms in "
        "the Prefect UI. Unknown keys are refused.\n"
    ]
    for title, path in SETTINGS.items():
        module, _, name = path.rpartition(".")
        model = getattr(importlib.import_module(module), name)
        parts += [f"## {title}\n", f"`{path}`\n", "| key | type | default | |", "| --- | --- | --- | --- |"]
        parts += [f"| {' | '.join(_cell(text) for text in row)} |" for row in _rows(model)]
        parts.append("")
    return "\n".join(parts)


def _rows(model: Any) -> Iterator[tuple[str, str, str, str]]:
    """A line for each field."""
    for name, field in model.model_fields.items():
        default = "required" if field.is_required() else repr(field.get_default(call_default_factory=False))
        if field.default_factory is not None:
            default = "depends on the machine"
        yield f"`{name}`", f"`{_type(field.annotation)}`", f"`{default}`", field.description or ""


def _type(annotation: Any) -> str:
    if annotation is types.NoneType:
        return "null"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(map(repr, arguments))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_type, arguments))
    return getattr(annotation, "__name__", str(annotation)) if not arguments else str(annotation)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def examples() -> str:
    """The example scripts, as they are run in the tests."""
    parts = ["# Examples\n\nEach is run by the tests, on small data.\n"]
    for file in sorted((ROOT / "examples").glob("*.*")):
        language = {".py": "python", ".yaml": "yaml"}[file.suffix]
        parts += [f"## {file.name}\n", f"```{language}", file.read_text(encoding="utf-8").rstrip(), "```", ""]
    return "\n".join(parts)


def measurements() -> str:
    """What the benchmarks wrote, one section a file."""
    head = (
        "# Measurements\n\nEvery figure comes from a script in `benchmarks/`, run as committed; each table says on "
        "what machine and under which load.\n"
    )
    files = sorted((ROOT / "benchmarks" / "results").glob("*.md"))
    return "\n".join([head, *(re.sub(r"^#", "##", file.read_text(encoding="utf-8"), flags=re.M) for file in files)])
