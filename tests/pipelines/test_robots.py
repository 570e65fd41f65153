"""robots.txt, X-Robots-Tag and TDM reservations."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.config import OPT_OUT_DIRECTIVES
from pipelines.robots import opted_out, parse_robots, parse_tdm, tdm_reserved

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ROBOTS = """
# comment
User-agent: OtherBot/2.0
User-agent: starflow
Disallow: /no/
Allow: /no/but-this
Disallow: /*.gif$
Disallow: /q?x=
Crawl-delay: 2

User-agent: *
Disallow: /
"""


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/", True),
        ("/no/a.png", False),
        ("/no/but-this.png", True),
        ("/a.gif", False),
        ("/a.gif?x", True),
        ("/q?x=1", False),
        ("/q?y=1", True),
    ],
)
def test_the_longest_match_decides(path: str, allowed: bool) -> None:
    assert parse_robots(ROBOTS, "starflow").allows(f"http://a.example{path}") is allowed


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("/\u00fc/", "/%C3%BC/a.png"),
        ("/%c3%bc/", "/%C3%BC/a.png"),
        ("/%7Ejoe/", "/~joe/a.png"),
        ("/~joe/", "/%7ejoe/a.png"),
        ("/a b", "/a%20b.png"),
        ("/a%3cd.html", "/a%3Cd.html"),
        ("/file-%2A.png", "/file-*.png"),
        ("/foo-%24", "/foo-$"),
        ("/*?q=\u00fc$", "/x?q=%C3%BC"),
    ],
)
def test_all_spellings_of_a_path_match(pattern: str, path: str) -> None:
    """RFC 9309, section 2.2.2 and 2.2.3."""
    rules = parse_robots(f"User-agent: *\nDisallow: {pattern}\nAllow: /%2F", "starflow")
    assert not rules.allows(f"http://a.example{path}")
    assert rules.allows("http://a.example/other")
    tdm = parse_tdm(json.dumps([{"location": pattern.replace("?q=\u00fc", ""), "tdm-reservation": 1}]))
    assert tdm_reserved(tdm, f"http://a.example{path}")


@pytest.mark.parametrize(
    ("path", "allowed"), [("/cgi$bin/a", False), ("/x$print/y", False), ("/end", False), ("/ends", True)]
)
def test_a_dollar_means_the_end_only_at_the_end(path: str, allowed: bool) -> None:
    rules = parse_robots("User-agent: *\nDisallow: /cgi$bin/\nDisallow: /*$print\nDisallow: /end$", "starflow")
    assert rules.allows(f"http://a.example{path}") == allowed


def test_an_escaped_slash_is_no_slash() -> None:
    assert parse_robots("User-agent: *\nDisallow: /a/b", "starflow").allows("http://a.example/a%2Fb")


def test_groups() -> None:
    assert parse_robots(ROBOTS, "STARFLOW").delay == 2
    assert not parse_robots(ROBOTS, "stranger").allows("http://a.example/x")
    assert parse_robots("", "starflow").allows("http://a.example/x")
    assert parse_robots("<html>not robots: at all</html>", "starflow").allows("http://a.example/x")
    assert parse_robots("User-agent: *\nDisallow:\n", "starflow").allows("http://a.example/x")
    assert parse_robots("User-agent: *\nCrawl-delay: soon", "starflow").delay == 0


@given(st.text(max_size=200), st.text(max_size=50))
def test_any_robots_file_can_be_read(text: str, path: str) -> None:
    parse_robots(text, "starflow").allows(f"http://a.example/{path.replace('[', '')}")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], False),
        (["all"], False),
        (["noai"], True),
        (["NoAI, noarchive"], True),
        (["noarchive", "noimageai"], True),
        (["noml"], True),
        (["none"], True),
        (["otherbot: noai"], False),
        (["otherbot: noarchive, noai"], False),
        (["otherbot: all, starflow: noai"], True),
        (["*: noai"], True),
        (["starflow: noai"], True),
        (["unavailable_after: 25 Jun 2010 15:00:00 PST, noai"], True),
        (["unavailable_after: Fri, 25 Jun 2010 15:00:00 GMT"], True),
        (["unavailable_after: Friday, 25-Jun-10 15:00:00 UTC"], True),
        (["unavailable_after: 2010-06-25"], True),
        (["unavailable_after: 2090-06-25T10:00:00+02:00"], False),
        (["unavailable_after: Sun, 25 Jun 2090 15:00:00 GMT, noai"], True),
        (["unavailable_after: some day"], False),
        (["max-image-preview: none"], False),
        (["max-snippet: -1, max-video-preview: 3"], False),
        ([": , ,:"], False),
    ],
)
def test_x_robots_tag(values: list[str], expected: bool) -> None:
    assert opted_out(values, "starflow", OPT_OUT_DIRECTIVES, NOW) is expected


@given(st.text(max_size=60))
def test_any_header_can_be_read(value: str) -> None:
    opted_out([value], "starflow", OPT_OUT_DIRECTIVES, NOW)


def test_tdm_reservation() -> None:
    patterns = parse_tdm('[{"location": "/img/*", "tdm-reservation": 1}, {"location": "/", "tdm-reservation": 0}]')
    assert tdm_reserved(patterns, "http://a.example/img/x.png")
    assert not tdm_reserved(patterns, "http://a.example/x.png")
    for broken in ("", "{}", "[1]", "[" * 10_000):
        assert parse_tdm(broken) == ()
