"""What a takedown names, in whatever spelling."""

from __future__ import annotations

from pathlib import Path

import pytest

from starflow.errors import ConfigError
from starflow.objectstore import open_store
from starflow.takedowns import Takedowns, check_entry, parse_entry

ID = "ab" * 32


@pytest.mark.parametrize(
    "asked", ["http://host.example/a%20b", "HTTP://Host.example:80/a b#top", "http://host.example./a b"]
)
@pytest.mark.parametrize(
    "held", ["http://host.example/a%20b", " HTTP://HOST.example:80/a b", "http://host.example./a b#x"]
)
def test_a_url_is_taken_down_in_every_spelling(asked: str, held: str) -> None:
    taken = Takedowns([("url", asked)])
    assert taken.entries == {("url", "http://host.example/a%20b")}
    others = ["http://host.example/a", "https://host.example/a b", "http://host.example:81/a b", None]
    assert taken.blocks([None] * 5, [held, *others]).tolist() == [True, False, False, False, False]


def test_escapes_of_a_url_are_compared_by_what_they_mean() -> None:
    taken = Takedowns([("url", "http://h/caf%c3%a9%2D1%2f")])
    urls = ["http://h/café-1%2F", "http://h/caf%C3%A9%2d1%2f", "http://h/café-1/", "http://h/caf%C3%89-1%2F"]
    assert taken.blocks([None] * 4, urls).tolist() == [True, True, False, False]


def test_what_is_no_web_address_is_compared_as_it_stands() -> None:
    taken = Takedowns([("url", "s3://bucket/A.png")])
    assert taken.blocks([None] * 2, ["s3://bucket/A.png", "s3://bucket/a.png"]).tolist() == [True, False]


@pytest.mark.parametrize("asked", ["Bücher.example", "xn--bcher-kva.example", "bücher.example."])
def test_a_host_is_taken_down_in_every_spelling_with_what_is_below_it(asked: str) -> None:
    taken = Takedowns([check_entry("host", asked)])
    urls = ["http://BÜCHER.example/1", "https://www.xn--bcher-kva.example:8443/", "http://cher.example/", "/a/file"]
    assert taken.blocks([None] * 4, urls).tolist() == [True, True, False, False]


def test_each_sample_names_the_entry_that_takes_it_down() -> None:
    taken = Takedowns(parse_entry(line) for line in (ID.upper(), "http://H.example/1", "example.org"))
    rules = taken.rules(
        [ID, None, None, None], ["http://h.example/1", "http://h.example/1", "http://a.example.org", ""]
    )
    assert rules == [("id", ID), ("url", "http://h.example/1"), ("host", "example.org"), None]
    assert Takedowns().rules([ID], ["http://h.example/1"]) == [None]


def test_the_same_set_is_stored_once_however_it_is_spelled(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    first = Takedowns([("url", "http://h/1"), ("host", "A.b")]).save(store)
    assert Takedowns([("host", "a.B."), ("url", "HTTP://H:80/1")]).save(store) == first
    assert Takedowns.load(store, first).entries == {("url", "http://h/1"), ("host", "a.b")}


@pytest.mark.parametrize(("kind", "value"), [("host", "a..b"), ("host", "h:80"), ("host", "http://h/"), ("id", "ab")])
def test_what_no_sample_can_have_is_refused(kind: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"takedown of {kind} '{value}'"):
        check_entry(kind, value)
