"""What the flows and the server's set-up agree on: names, and which lists a backfill works through."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.deployment import BackfillConfig, limit_name
from starflow.errors import NotFoundError


def names(folder: Path, **chosen: str) -> list[str]:
    return [Path(each).name for each in BackfillConfig(lists=str(folder), **chosen).partitions()]


@pytest.fixture
def lists(tmp_path: Path) -> Path:
    """Files and folders named after days, as people keep them."""
    days = ("2026-01-30.txt", "2026-02-01.csv", "2026-02-02.txt.gz")
    for name in (*days, "date=2026-01-31/a.txt", "date=2026-01-31/b.txt"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.touch()
    (tmp_path / "notes.md").touch()
    return tmp_path


def test_children_of_a_folder_are_lists_in_order(lists: Path) -> None:
    assert names(lists) == ["2026-01-30.txt", "date=2026-01-31", "2026-02-01.csv", "2026-02-02.txt.gz"]


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        ("2026-01-31", "", ["date=2026-01-31", "2026-02-01.csv", "2026-02-02.txt.gz"]),
        ("", "2026-01", ["2026-01-30.txt", "date=2026-01-31"]),
        ("2026-01-31", "2026-02-01", ["date=2026-01-31", "2026-02-01.csv"]),
    ],
)
def test_first_and_last_are_dates_or_how_they_begin(lists: Path, first: str, last: str, expected: list[str]) -> None:
    assert names(lists, first=first, last=last) == expected


def test_a_glob_gives_its_files(lists: Path) -> None:
    assert names(lists / "date=*" / "*.txt") == ["a.txt", "b.txt"]


def test_nothing_between_says_what_there_is(lists: Path) -> None:
    with pytest.raises(NotFoundError, match=r"first='2027'.*it holds 4 from 2026-01-30.txt to 2026-02-02.txt.gz"):
        names(lists, first="2027")


def test_limit_names_are_allowed_and_differ() -> None:
    found = {limit_name(store) for store in ("s3://a/b", "s3://a/b/", "s3://a-b", "/tmp/a/b")}
    assert len(found) == 3
    assert not any(set(name) & set("/%&<>") for name in found)
