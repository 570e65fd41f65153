"""`starflow doctor`: what this machine lacks for the demo, training and clusters, each with its remedy."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from starflow.config import Config
from starflow.errors import REINSTALL, StarflowError

#: What the demo needs at its peak, in bytes.
DEMO_MEMORY, DEMO_DISK = 8 * 2**30, 4 * 2**30


class Finding(Config):
    """One thing looked at."""

    name: str = Field(description="What was looked at.")
    state: Literal["ok", "missing", "advice"] = Field(description="`missing` makes the exit code 1.")
    value: str = Field(description="What was found.")
    remedy: str = Field(default="", description="What to do about it.")


def examine(store: str | None = None) -> list[Finding]:
    """Looks at Python, packages, hardware, loopback ports and, if named, an object store."""
    findings = [_python(), *_packages(), *_hardware(), _ports()]
    if store is not None:
        findings.append(_store(store))
    return findings


def print_findings(findings: list[Finding]) -> None:
    """A table on stdout, and the remedies below it."""
    from rich.console import Console
    from rich.table import Table

    out, colours = Console(), {"ok": "green", "missing": "red", "advice": "yellow"}
    table = Table("check", "state", "found")
    for finding in findings:
        table.add_row(finding.name, f"[{colours[finding.state]}]{finding.state}[/]", finding.value)
    out.print(table)
    for finding in findings:
        if finding.remedy:
            out.print(f"[{colours[finding.state]}]{finding.name}[/]: {finding.remedy}", soft_wrap=True, markup=True)


def _python() -> Finding:
    version = platform.python_version()
    if (3, 11) <= sys.version_info[:2] < (3, 13):
        return Finding(name="python", state="ok", value=version)
    return Finding(
        name="python",
        state="missing",
        value=version,
        remedy="install Python 3.11 or 3.12 and run `make clean demo PYTHON=python3.11`",
    )


def _packages() -> Iterator[Finding]:
    """Every dependency the distribution declares: missing ones, and versions outside the declared range."""
    from packaging.requirements import Requirement

    for text in importlib.metadata.requires("starflow") or []:
        requirement = Requirement(text)
        extra = next(iter(re.findall(r"extra == [\"'](\w+)[\"']", str(requirement.marker or ""))), "")
        if extra not in ("", "demo") or requirement.name == "starflow":
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(
                name=requirement.name,
                # The demo's servers and pictures are not needed where production ones exist.
                state="advice" if extra else "missing",
                value="not installed",
                remedy=f"{REINSTALL}{' (for the demo and `starflow up`)' if extra else ''}",
            )
            continue
        if requirement.specifier.contains(version, prereleases=True):
            yield Finding(name=requirement.name, state="ok", value=version)
        else:
            yield Finding(
                name=requirement.name,
                state="missing",
                value=f"{version}, needed {requirement.specifier}",
                remedy=REINSTALL,
            )


def _hardware() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    yield Finding(name="cores", state="ok", value=str(cores))
    if importlib.util.find_spec("psutil"):  # its absence is among the packages' findings
        import psutil

        memory = psutil.virtual_memory().available
        yield Finding(
            name="memory",
            state="ok" if memory >= DEMO_MEMORY else "advice",
            value=f"{memory / 2**30:.1f} GiB available",
            remedy="" if memory >= DEMO_MEMORY else "the demo uses up to 8 GiB; close other programs",
        )
    free = shutil.disk_usage(Path.cwd()).free
    yield Finding(
        name="disk",
        state="ok" if free >= DEMO_DISK else "missing",
        value=f"{free / 2**30:.1f} GiB free in {Path.cwd()}",
        remedy="" if free >= DEMO_DISK else "free 4 GiB, or work in a folder on another disk",
    )
    yield _gpu()


def _gpu() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding(name="gpu", state="advice", value="unknown: torch is not installed")
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding(name="gpu", state="missing", value=f"torch cannot be imported: {error}", remedy=REINSTALL)
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        return Finding(name="gpu", state="ok", value=f"{torch.cuda.device_count()} x {', '.join(sorted(names))}")
    return Finding(
        name="gpu",
        state="advice",
        value="none",
        remedy="the demo runs on the CPU; real training wants CUDA GPUs and a CUDA build of torch",
    )


def _ports() -> Finding:
    from infra.stack import free_ports

    try:
        free_ports(["probe"], {})
    except StarflowError as error:
        return Finding(name="ports", state="missing", value="none free", remedy=str(error))
    return Finding(name="ports", state="ok", value="loopback ports can be bound")


def _store(url: str) -> Finding:
    """Writes, reads and deletes one small object."""
    from starflow.objectstore import open_store

    key = f".doctor-{os.getpid()}"
    try:
        store = open_store(url)
        store.write(key, b"ok")
        store.read(key)
        store.delete([key])
    except StarflowError as error:
        return Finding(name="store", state="missing", value=f"{url} cannot be used", remedy=str(error))
    return Finding(name="store", state="ok", value=f"{url} can be written and read")
