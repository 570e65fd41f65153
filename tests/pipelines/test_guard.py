"""Addresses are checked when they are connected to. What servers answer is tried in test_crawl.py."""

from __future__ import annotations

import gzip
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines import guard
from pipelines.guard import FetchError, FetchPolicy, _retry_after, checked, get, is_public
from tests.pipelines.hostile_web import response

POLICY = FetchPolicy(user_agent="starflow/0", agent_token="starflow", seconds=60.0)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("::ffff:93.184.216.34", True),
        ("127.0.0.1", False),
        ("10.0.0.1", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("255.255.255.255", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("::", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:169.254.169.254", False),
        ("64:ff9b::a00:1", False),
        ("2002:7f00:1::", False),
        ("2001:0:7f00:1::", False),
        ("168.63.129.16", False),
        ("192.0.0.192", False),
        ("::ffff:168.63.129.16", False),
        ("fec0::1", False),
        ("3fff::1", False),
    ],
)
def test_is_public(address: str, public: bool) -> None:
    assert is_public(address) is public


@pytest.mark.parametrize(
    ("url", "reason"), [("file:///x", "scheme"), ("data:,x", "scheme"), ("x", "bad_url"), ("http://", "bad_url")]
)
def test_only_http(url: str, reason: str) -> None:
    with pytest.raises(FetchError, match=reason):
        checked(url)


def resolve_to(monkeypatch: pytest.MonkeyPatch, *answers: str) -> list[Any]:
    """Names resolve to one answer after the other; returns the addresses that are connected to."""
    left, connected = list(answers), []

    def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        address = left.pop(0) if len(left) > 1 else left[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    def connect(self: socket.socket, address: Any) -> None:
        connected.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket.socket, "connect", connect)
    return connected


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.7", "169.254.169.254"])
def test_a_name_that_resolves_to_a_private_address_is_not_connected_to(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    connected = resolve_to(monkeypatch, address)
    with pytest.raises(FetchError, match="private_address"):
        get("http://innocent.example/a.png", POLICY)
    assert connected == []


def test_what_was_checked_is_what_is_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that resolves differently the second time (rebinding) is resolved only once."""
    connected = resolve_to(monkeypatch, "93.184.216.34", "127.0.0.1")
    with pytest.raises(FetchError, match="connection"):
        get("http://rebinding.example/a.png", POLICY)
    assert connected == [("93.184.216.34", 80)]


def test_listed_hosts_may_be_private_on_the_listed_port_only(monkeypatch: pytest.MonkeyPatch) -> None:
    connected = resolve_to(monkeypatch, "10.0.0.7")
    policy = POLICY.model_copy(update={"allow_host": ("mine.example:8080",)})
    with pytest.raises(FetchError, match="connection"):
        get("http://mine.example:8080/a.png", policy)
    with pytest.raises(FetchError, match="private_address"):
        get("http://mine.example/a.png", policy)
    assert connected == [("10.0.0.7", 8080)]


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("120", 120.0),
        (" 5 ", 5.0),
        ("99999999999", 7 * 86400.0),
        ("Fri, 01 Jan 2100 00:00:00 GMT", 7 * 86400.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("soon", None),
        ("-3", None),
    ],
)
def test_retry_after_in_both_its_forms(header: str | None, seconds: float | None) -> None:
    assert _retry_after(header) == seconds


def test_a_retry_after_date_is_counted_from_now() -> None:
    header = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    assert 90 < (_retry_after(header) or 0) <= 100


def test_names_that_do_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "try again")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(FetchError, match="dns") as caught:
        get("http://nowhere.example/a.png", POLICY)
    assert caught.value.transient


@contextmanager
def serving(*answers: bytes) -> Iterator[tuple[str, list[str]]]:
    """A server that gives one answer after the other, the last one again and again; (its host and port, paths)."""
    paths: list[str] = []

    def serve(server: socket.socket) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                paths.append(connection.recv(65536).partition(b" ")[2].partition(b" ")[0].decode("latin-1"))
                connection.sendall(answers[min(len(paths), len(answers)) - 1])

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, args=(server,), daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}", paths
        server.shutdown(socket.SHUT_RDWR)


OWN = POLICY.model_copy(update={"allow_host": ("127.0.0.1",)})


def moved(location: str) -> bytes:
    return response(b"", f"Location: {location}", status="HTTP/1.1 302 Found")


def refusal(*answers: bytes, scheme: str = "http", policy: FetchPolicy = OWN, **options: Any) -> FetchError:
    """What a fetch from a server with these answers ends with."""
    with serving(*answers) as (place, _), pytest.raises(FetchError) as caught:
        get(f"{scheme}://{place}/a.png", policy, **options)
    return caught.value


def test_a_server_that_speaks_no_tls_is_a_tls_failure() -> None:
    error = refusal(b"HTTP/1.1 400 Bad Request\r\n\r\n", scheme="https")
    assert (error.reason, error.transient) == ("tls", False)
    assert isinstance(error.__cause__, ssl.SSLError)


def test_a_cut_tls_handshake_may_succeed_next_time() -> None:
    error = refusal(b"", scheme="https")
    assert (error.reason, error.transient) == ("tls", True)


@pytest.mark.parametrize("status", [500, 501, 505, 508, 511, 526, 530, 429, 408])
def test_what_servers_cannot_do_now_they_may_do_later(status: int) -> None:
    assert refusal(response(b"", status=f"HTTP/1.1 {status} No")).transient


def test_a_304_that_was_not_asked_for_is_a_failure() -> None:
    answer = b"HTTP/1.1 304 Not Modified\r\n\r\n"
    error = refusal(answer)
    assert (error.reason, error.transient) == ("http_304", True)
    with serving(answer) as (place, _):
        assert get(f"http://{place}/a.png", OWN, {"If-None-Match": '"1"'}).status == 304


def test_a_location_in_utf_8_is_followed() -> None:
    with serving(moved("/\u00fc.png".encode().decode("latin-1")), response(b"x")) as (place, paths):
        assert get(f"http://{place}/a.png", OWN).body == b"x"
    assert paths == ["/a.png", "/%C3%BC.png"]


def test_a_location_that_is_no_url_is_refused() -> None:
    assert refusal(moved("http://[")).reason == "bad_url"


@pytest.mark.parametrize("location", ["http://blocked.example/", "http://IMG.blocked.example./a"])
def test_a_redirect_to_a_blocked_host_is_not_followed(location: str) -> None:
    policy = OWN.model_copy(update={"block_hosts": frozenset(("blocked.example",))})
    error = refusal(moved(location), policy=policy)
    assert (error.reason, error.transient, error.status) == ("blocked_host", False, 302)


def test_each_hop_is_visited_and_its_wait_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    visited: list[str] = []
    monkeypatch.setattr(guard, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + 40 * len(visited)))

    def visit(url: str) -> nullcontext[None]:
        visited.append(url)
        return nullcontext()

    with serving(moved("/b"), response(b"x")) as (place, _):
        get(f"http://{place}/a", OWN, visit=visit)
        assert visited == [f"http://{place}/a", f"http://{place}/b"]


@pytest.mark.parametrize("encode", [bytes, gzip.compress])
def test_a_body_may_be_cut_instead_of_refused(encode: Callable[[bytes], bytes]) -> None:
    headers = ["Content-Encoding: gzip"] if encode is gzip.compress else []
    policy = OWN.model_copy(update={"max_bytes": 100})
    answer = response(encode(b"x" * 10**6), *headers)
    assert refusal(answer, policy=policy).reason == "too_large"
    with serving(answer) as (place, _):
        assert get(f"http://{place}/a", policy, cut=True).body == b"x" * 100
