"""One spelling per URL."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starflow.urls import host_of, is_below, normalise, resource_path, url_key


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("HTTP://Example.COM:80", "http://example.com/"),
        ("https://example.com:443/a?b=c#d", "https://example.com/a?b=c"),
        ("http://example.com:8080/", "http://example.com:8080/"),
        (" http://example.com/a b,c\n", "http://example.com/a%20b,c"),
        ("http://bücher.example/ü?q=ä", "http://xn--bcher-kva.example/%C3%BC?q=%C3%A4"),
        ("http://example.com/%7Ea%zz", "http://example.com/%7Ea%25zz"),
        ("http://[::1]:81/x", "http://[::1]:81/x"),
        ("http://example.com./x", "http://example.com/x"),
    ],
)
def test_normalise(url: str, expected: str) -> None:
    assert normalise(url) == expected
    assert normalise(expected) == expected


@pytest.mark.parametrize(
    "url", ["", "x", "ftp://a/b", "http://", "http://u:p@a/", "http://a:x/", "http://[::1", "http://a..b/"]
)
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the message is for the log
        normalise(url)
    assert len(url_key(url)) == 32


def test_a_host_has_one_spelling() -> None:
    spelled = ("http://Bücher.example./a", "https://xn--bcher-kva.EXAMPLE:8443", " http://xn--bcher-kva.example")
    assert {host_of(url) for url in spelled} == {"xn--bcher-kva.example"}
    assert host_of("http://[::1]:80/") == "::1"
    assert (host_of("s3://bucket/key"), host_of("/a/file"), host_of("http://a..b/")) == ("bucket", "", "")


@given(st.text(max_size=40))
def test_any_text_has_a_key_and_a_host(text: str) -> None:
    assert url_key(text) == url_key(text)
    assert isinstance(host_of(text), str)


@given(st.text(max_size=30), st.text(max_size=30))
def test_normalising_twice_is_normalising_once(path: str, query: str) -> None:
    once = normalise("http://example.com/" + path.replace("#", "") + "?" + query.replace("#", ""))
    assert normalise(once) == once
    assert once.isascii()


@pytest.mark.parametrize(
    ("host", "below"),
    [("a.example", True), ("x.y.a.example", True), ("b.example", False), ("ba.example", False), ("example", False)],
)
def test_a_host_is_below_itself_and_its_domains(host: str, below: bool) -> None:
    assert is_below(host, {"a.example", "c.example"}) is below
    assert not is_below(host, ())


def test_paths_have_one_spelling() -> None:
    assert resource_path("/\u00fc%7e%3c b?x=*$") == "/%C3%BC~%3C%20b?x=*$"
    assert resource_path("/\ud800") == "/?"
