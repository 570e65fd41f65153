"""A guarded HTTP client for URLs that nobody vouches for.

Every address is checked when it is connected to, so that redirects, decimal spellings and names that resolve
differently the second time reach nothing private. Bytes, seconds and redirects are bounded, whatever the server does.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urljoin, urlsplit

from starflow.config import Config
from starflow.urls import normalise

REDIRECTS = frozenset((301, 302, 303, 307, 308))
#: Answers that may differ next time; every other failure is final.
TRANSIENT_STATUS = frozenset((408, 425, 429, 500, 502, 503, 504, 509, 520, 521, 522, 523, 524))
_BLOCK = 2**16
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class FetchPolicy(Config):
    """What a fetch may do. Also the message that tells a crawl subprocess so."""

    user_agent: str
    agent_token: str
    allow_host: tuple[str, ...] = ()
    max_bytes: int = 20 * 2**20
    seconds: float = 15.0
    max_redirects: int = 5
    max_pixels: int = 2**26
    max_frames: int = 100
    robots: bool = True
    tdm: bool = True
    opt_out: tuple[str, ...] = ()
    host_concurrency: int = 8
    host_rate: float = 0.0

    def trusts(self, host: str, port: int) -> bool:
        """Whether the operator listed this host: then its addresses may be private and no limit per host holds."""
        return host in self.allow_host or f"{host}:{port}" in self.allow_host


class FetchError(Exception):
    """A fetch that gave nothing: a short machine-readable reason, and whether a later try may succeed."""

    def __init__(
        self, reason: str, *, transient: bool = False, status: int = 0, retry_after: float | None = None
    ) -> None:
        super().__init__(reason)
        self.reason, self.transient, self.status, self.retry_after = reason, transient, status, retry_after


@dataclass(frozen=True)
class Answer:
    """A final answer: HTTP status (200 or 304), headers, body as sent, and the URL that gave it."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes
    url: str


def is_public(address: str) -> bool:
    """Whether an IP address is on the public internet, seen through IPv6 forms that embed an IPv4 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        embedded = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in _NAT64:
            embedded = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if embedded is not None:
            return is_public(str(embedded))
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def checked(url: str) -> str:
    """The normalised URL. Raises FetchError: scheme for another one than http and https, bad_url for the rest."""
    try:
        return normalise(url)
    except ValueError as error:
        scheme = url.strip().partition(":")[0].lower()
        other = ":" in url and scheme.isalnum() and scheme not in ("http", "https")
        raise FetchError("scheme" if other else "bad_url") from error


def get(
    url: str,
    policy: FetchPolicy,
    headers: Mapping[str, str] | None = None,
    permit: Callable[[str], None] | None = None,
    accept: Callable[[http.client.HTTPMessage], None] | None = None,
) -> Answer:
    """Fetches a URL within the policy's limits.

    `permit` may refuse each hop before it is asked for, `accept` a final answer by its headers before its body is
    read; both do so by raising FetchError. Time spent in `permit` does not count.
    Raises FetchError, and nothing else, whatever the server does.
    """
    deadline = time.monotonic() + policy.seconds
    for _ in range(policy.max_redirects + 1):
        url = checked(url)
        if permit is not None:
            asked = time.monotonic()
            permit(url)
            deadline += time.monotonic() - asked
        answer = _request(url, policy, headers or {}, deadline, accept)
        if answer.status not in REDIRECTS:
            return answer
        url = urljoin(url, answer.headers.get("Location", ""))
    raise FetchError("redirects")


def _request(
    url: str,
    policy: FetchPolicy,
    headers: Mapping[str, str],
    deadline: float,
    accept: Callable[[http.client.HTTPMessage], None] | None,
) -> Answer:
    parts = urlsplit(url)
    host, secure = parts.hostname or "", parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    target = parts.path + (f"?{parts.query}" if parts.query else "")
    # http.client would open the connection itself; it is given one whose address has been checked.
    connection = http.client.HTTPConnection(host, port)
    try:
        connection.sock = _connect(host, port, secure, policy, deadline)
        connection.putrequest("GET", target, skip_host=True, skip_accept_encoding=True)
        fixed = {
            "Host": parts.netloc,
            "User-Agent": policy.user_agent,
            "Accept": "image/*,*/*;q=0.5",
            "Accept-Encoding": "identity",
            "Connection": "close",
        }
        for name, value in {**fixed, **headers}.items():
            connection.putheader(name, value)
        connection.endheaders()
        response = connection.getresponse()
        if accept is not None and response.status in (200, 304):
            accept(response.msg)
        return _read(response, url, policy, deadline)
    except TimeoutError as error:
        raise FetchError("timeout", transient=True) from error
    except ssl.SSLError as error:
        raise FetchError("tls") from error
    except OSError as error:
        raise FetchError("connection", transient=True) from error
    except (http.client.HTTPException, ValueError) as error:
        raise FetchError("protocol") from error
    finally:
        connection.close()


def _read(response: http.client.HTTPResponse, url: str, policy: FetchPolicy, deadline: float) -> Answer:
    status, headers = response.status, response.msg
    if status in REDIRECTS and headers.get("Location"):
        return Answer(status, headers, b"", url)
    if status == 304:
        return Answer(status, headers, b"", url)
    if status != 200:
        retry_after = _retry_after(headers.get("Retry-After"))
        transient = status in TRANSIENT_STATUS
        raise FetchError(f"http_{status}", transient=transient, status=status, retry_after=retry_after)
    length = headers.get("Content-Length", "")
    expected = int(length) if length.isdigit() else None
    if expected is not None and expected > policy.max_bytes:
        raise FetchError("too_large", status=status)
    body = _body(response, policy.max_bytes, deadline)
    if expected is not None and len(body) < expected and not response.chunked:
        raise FetchError("truncated", transient=True, status=status)
    return Answer(status, headers, _decoded(body, headers, policy.max_bytes), url)


def _body(response: http.client.HTTPResponse, limit: int, deadline: float) -> bytes:
    blocks, size = [], 0
    try:
        # read1 gives what has arrived, so that the deadline is looked at between the drops of a drip.
        while block := response.read1(_BLOCK):
            blocks.append(block)
            size += len(block)
            if size > limit:
                raise FetchError("too_large", status=response.status)
            if time.monotonic() > deadline:
                raise FetchError("timeout", transient=True, status=response.status)
    except http.client.IncompleteRead as error:
        raise FetchError("truncated", transient=True, status=response.status) from error
    return b"".join(blocks)


def _decoded(body: bytes, headers: http.client.HTTPMessage, limit: int) -> bytes:
    """Undoes a Content-Encoding that was sent though it was not asked for, within the limit on bytes."""
    encoding = headers.get("Content-Encoding", "identity").strip().lower()
    if encoding in ("identity", ""):
        return body
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise FetchError("content_encoding", status=200)
    inflater = zlib.decompressobj(wbits=47 if "gzip" in encoding else 15)
    try:
        data = inflater.decompress(body, limit + 1)
    except zlib.error as error:
        raise FetchError("content_encoding", status=200) from error
    if len(data) > limit:
        raise FetchError("too_large", status=200)
    return data


def _retry_after(value: str | None) -> float | None:
    """Seconds to wait, from a Retry-After header in either of its forms; at most a week."""
    if not value:
        return None
    if value.strip().isdigit():
        return min(float(value), 7 * 86400.0)
    try:
        return min(max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0), 7 * 86400.0)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


class _Bounded:
    """Mixed into sockets: every receive has only the time that is left, so no drip outlives the deadline."""

    deadline: float

    def recv_into(self, *arguments: Any) -> int:
        self.settimeout(_left(self.deadline))  # type: ignore[attr-defined]
        return super().recv_into(*arguments)  # type: ignore[misc]


class _BoundedSocket(_Bounded, socket.socket):
    pass


class _BoundedTLSSocket(_Bounded, ssl.SSLSocket):
    pass


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the time for this URL is used up")
    return left


def _tls_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.sslsocket_class = _BoundedTLSSocket
    return context


_TLS = _tls_context()


def _connect(host: str, port: int, secure: bool, policy: FetchPolicy, deadline: float) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        temporary = getattr(error, "errno", None) == socket.EAI_AGAIN
        raise FetchError("dns", transient=temporary) from error
    if not policy.trusts(host, port):
        found = [entry for entry in found if is_public(str(entry[4][0]))]
    if not found:
        raise FetchError("private_address")
    failure: OSError | None = None
    for family, kind, protocol, _, address in found[:4]:
        sock = _BoundedSocket(family, kind, protocol)
        sock.deadline = deadline
        try:
            sock.settimeout(_left(deadline))
            # The address itself, not the name: what was checked is what is connected to.
            sock.connect(address)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if not secure:
                return sock
            tls = _TLS.wrap_socket(sock, server_hostname=host)
            tls.deadline = deadline  # type: ignore[attr-defined]
            return tls
        except OSError as error:
            sock.close()
            failure = error
    raise failure if failure is not None else OSError("no address")
