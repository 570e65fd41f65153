"""Who may import whom: read from the syntax trees, so that a breach fails here and not in production."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("starflow", "pipelines", "training", "infra")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

#: Which siblings a package may import. Nothing imports infra; pipelines and training meet only at the snapshot.
ALLOWED = {
    "starflow": set(),
    "pipelines": {"starflow"},
    "training": {"starflow"},
    "infra": {"starflow", "pipelines", "training"},
}

#: Each heavy dependency has one owner.
OWNERS = {
    "prefect": {"pipelines/flows.py", "infra/train_flow.py", "infra/upkeep_flows.py"},
    "ray": {"infra/launch/ray.py", "infra/launch/ray_job.py", "pipelines/actors.py"},
    "zarr": {"starflow/latents.py"},
    "boto3": {"starflow/s3store.py"},
    "deepspeed": {"training/engine.py"},
    "diffusers": {"starflow/encoders.py"},
    "transformers": {"starflow/encoders.py", "pipelines/captioners.py"},
}


def imports(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module, node.lineno


def test_packages_import_only_what_they_may() -> None:
    breaches = []
    for path in SOURCES:
        name = path.relative_to(ROOT).as_posix()
        package = name.split("/")[0]
        for module, line in imports(path):
            top = module.split(".")[0]
            if top in PACKAGES and top != package and top not in ALLOWED[package]:
                breaches.append(f"{name}:{line} imports {module}")
            if top in OWNERS and name not in OWNERS[top]:
                breaches.append(f"{name}:{line} imports {module}, which belongs to {sorted(OWNERS[top])}")
    assert breaches == []


def test_the_owners_exist_and_use_what_they_own() -> None:
    for dependency, owners in OWNERS.items():
        for owner in owners:
            tops = {module.split(".")[0] for module, _ in imports(ROOT / owner)}
            assert dependency in tops, f"{owner} no longer imports {dependency}; correct OWNERS"


def test_the_model_needs_only_torch() -> None:
    foreign = {module.split(".")[0] for module, _ in imports(ROOT / "starflow/model.py")}
    assert foreign - set(sys.stdlib_module_names) - {"starflow"} == {"torch"}


def test_no_relative_imports() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}:{node.lineno}"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_the_command_line_answers_at_once(arguments: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "starflow.cli", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200)
    assert result.stderr.count("import time:") < 500  # 370 when this was written; torch alone has more
    for heavy in ("torch", "ray", "prefect", "deepspeed", "numpy", "pydantic"):
        assert f" {heavy}\n" not in result.stderr
