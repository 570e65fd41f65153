"""Addresses are checked when they are connected to. What servers answer is tried in test_crawl.py."""

from __future__ import annotations

import socket
import ssl
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from pipelines.guard import FetchError, FetchPolicy, _retry_after, checked, get, is_public

POLICY = FetchPolicy(user_agent="starflow/0", agent_token="starflow", seconds=2.0)


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


def test_a_server_that_speaks_no_tls_is_a_tls_failure() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        import threading

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        policy = POLICY.model_copy(update={"allow_host": ("127.0.0.1",)})
        with pytest.raises(FetchError, match="tls") as caught:
            get(f"https://127.0.0.1:{server.getsockname()[1]}/a.png", policy)
        assert isinstance(caught.value.__cause__, ssl.SSLError)
