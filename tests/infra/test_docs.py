"""The documentation site builds, with every link checked and without asking other hosts; what it quotes is real."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from starflow.cli import COMMANDS
from tests.infra.command_lines import check_command

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
PACKAGES = ("starflow", "pipelines", "training", "infra")
PAGES = [path for path in sorted(DOCS.rglob("*.md")) if "reference" not in path.parts]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)
    assert built.returncode == 0, built.stderr
    return folder


class Loaded(HTMLParser):
    """What a browser fetches by itself when it opens a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in ("script", "img", "iframe", "source"):
            self.addresses.append(values.get("src") or "")
        if tag == "link" and values.get("rel") in ("stylesheet", "icon", "preconnect", "preload"):
            self.addresses.append(values.get("href") or "")


def test_the_site_builds_and_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 12
    for page in pages:
        reader = Loaded()
        reader.feed(page.read_text(encoding="utf-8"))
        outside = [address for address in reader.addresses if address.startswith(("http:", "https:", "//"))]
        assert outside == [], page.name


def test_the_reference_has_every_command_setting_and_public_name(site: Path) -> None:
    commands = (site / "reference" / "cli.html").read_text(encoding="utf-8")
    assert all(f"starflow {name}" in commands for name in COMMANDS)
    assert "--dry-run" in commands
    settings = (site / "reference" / "settings.html").read_text(encoding="utf-8")
    assert all(key in settings for key in ("hang_timeout", "url_column", "train_share_of_peak", "api_networks"))
    python = (site / "reference" / "python.html").read_text(encoding="utf-8")
    for name in ("starflow.objectstore.ObjectStore.create", "starflow.reader.SnapshotReader.gather", "CorruptError"):
        assert name in python
    assert "find_outliers" in (site / "reference" / "examples.html").read_text(encoding="utf-8")


def literals() -> list[str]:
    """Every string that the code can print; a value that is put into one is a NUL."""
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = (str(p.value) if isinstance(p, ast.Constant) else "\0" for p in node.values)
                    found.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def quoted() -> list[tuple[str, str]]:
    """(page, message) of every error that the pages quote."""
    pattern = re.compile(r"^    error: (.+)$", re.M)
    return [(page.name, message) for page in PAGES for message in pattern.findall(page.read_text(encoding="utf-8"))]


def test_quoted_errors_are_those_of_the_code() -> None:
    strings, messages = literals(), quoted()
    assert len(messages) > 25
    unknown = [
        f"{page}: {piece!r} of {message!r}"
        for page, message in messages
        for piece in re.split(r"<[^>]*>|; ", message)
        if len(piece.strip()) > 3 and not any(piece.strip() in text for text in strings)
    ]
    assert unknown == []


def shell_commands() -> list[tuple[str, str]]:
    """(page, command line) of every `starflow` command that the pages tell people to type."""
    found = []
    for page in [*PAGES, ROOT / "README.md"]:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            joined = block.replace("\\\n", " ")
            found += [(page.name, line) for line in joined.splitlines() if re.match(r'(eval "\$\()?starflow ', line)]
    return found


def test_commands_in_the_pages_exist_with_those_options() -> None:
    found = shell_commands()
    assert len(found) > 25
    for page, line in found:
        check_command(line, page)


def test_the_schedule_page_names_every_deployment_and_automation() -> None:
    page = (DOCS / "howto" / "schedule.md").read_text(encoding="utf-8")
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    automations = yaml.safe_load((ROOT / "infra" / "automations.yaml").read_text())
    names = [*(each["name"] for each in deployments), *(each["name"] for each in automations)]
    assert [name for name in names if name.removeprefix("starflow: ") not in page] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_speak_of_no_workplace(page: Path) -> None:
    assert not re.search(r"/work/|\bissue \d|\bsession\b", page.read_text(encoding="utf-8"))
