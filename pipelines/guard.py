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
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urljoin, urlsplit

from starflow.config import Config
from starflow.images import MAX_PIXELS
from starflow.urls import is_below, normalise

REDIRECTS = frozenset((301, 302, 303, 307, 308))
#: Answers that may differ next time, as all of 5xx; every other failure is final.
_TRANSIENT_STATUS = frozenset((304, 408, 425, 429))
_BLOCK = 2**16
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
#: Networks that Python's `is_global` takes for public ones.
_NOT_PUBLIC = tuple(
    map(
        ipaddress.ip_network,
        (
            "168.63.129.16/32",  # Azure: the agent of each virtual machine, with its settings
            "192.0.0.0/24",  # RFC 6890: protocol assignments; Oracle Cloud: metadata
            "fec0::/10",  # RFC 3879: what site-local addresses were
            "3fff::/20",  # RFC 9637: documentation
        ),
    )
)


class FetchPolicy(Config):
    """What a fetch may do. Also the message that tells a crawl subprocess so."""

    user_agent: str
    agent_token: str
    allow_host: tuple[str, ...] = ()
    block_hosts: frozenset[str] = frozenset()
    max_bytes: int = 20 * 2**20
    seconds: float = 15.0
    max_redirects: int = 5
    max_pixels: int = MAX_PIXELS
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
    """A fetch that gave nothing: a short machine-readable reason, whether a later try may succeed, the last HTTP
    status that came (0: none), and for how many seconds the server asks us to wait."""

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
    special = ip.is_multicast or ip.is_reserved or ip.is_unspecified or any(ip in network for network in _NOT_PUBLIC)
    return ip.is_global and not special


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
    visit: Callable[[str], AbstractContextManager[object]] = nullcontext,
    accept: Callable[[http.client.HTTPMessage], None] | None = None,
    cut: bool = False,
) -> Answer:
    """Fetches a URL within the policy's limits.

    `visit` surrounds each hop, which it may delay or refuse, `accept` may refuse a final answer by its headers before
    its body is read; both refuse by raising FetchError. Time spent on entering `visit` does not count. Of a body that
    is too large, `cut` gives the beginning.
    Raises FetchError, and nothing else, whatever the server does.
    """
    deadline, status = time.monotonic() + policy.seconds, 0
    for _ in range(policy.max_redirects + 1):
        try:
            url = _unblocked(url, policy)
            asked = time.monotonic()
            with visit(url):
                deadline += time.monotonic() - asked
                answer = _request(url, policy, headers or {}, deadline, accept, cut)
            if answer.status not in REDIRECTS:
                return answer
            status = answer.status
            url = _target(url, answer.headers["Location"])
        except FetchError as error:
            error.status = error.status or status
            raise
    raise FetchError("redirects", status=status)


def _unblocked(url: str, policy: FetchPolicy) -> str:
    url = checked(url)
    if policy.block_hosts and is_below(urlsplit(url).hostname or "", policy.block_hosts):
        raise FetchError("blocked_host")
    return url


def _target(url: str, location: str) -> str:
    """Where a redirect from `url` leads; http.client reads headers as Latin-1, servers also write UTF-8."""
    with suppress(UnicodeError):
        location = location.encode("latin-1").decode("utf-8")
    try:
        return urljoin(url, location)
    except ValueError as error:
        raise FetchError("bad_url") from error


def _request(
    url: str,
    policy: FetchPolicy,
    headers: Mapping[str, str],
    deadline: float,
    accept: Callable[[http.client.HTTPMessage], None] | None,
    cut: bool,
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
        if response.status == 304 and headers:
            return Answer(304, response.msg, b"", url)
        return _read(response, url, policy.max_bytes, deadline, cut)
    except TimeoutError as error:
        raise FetchError("timeout", transient=True) from error
    except ssl.SSLError as error:
        # A handshake that is cut off may be one of a server that starts.
        raise FetchError("tls", transient=isinstance(error, ssl.SSLEOFError)) from error
    except OSError as error:
        raise FetchError("connection", transient=True) from error
    except (http.client.HTTPException, ValueError) as error:
        raise FetchError("protocol") from error
    finally:
        connection.close()


def _read(response: http.client.HTTPResponse, url: str, limit: int, deadline: float, cut: bool) -> Answer:
    status, headers = response.status, response.msg
    if status in REDIRECTS and headers.get("Location"):
        return Answer(status, headers, b"", url)
    if status != 200:
        retry_after = _retry_after(headers.get("Retry-After"))
        transient = status in _TRANSIENT_STATUS or 500 <= status < 600
        raise FetchError(f"http_{status}", transient=transient, status=status, retry_after=retry_after)
    length = headers.get("Content-Length", "")
    expected = int(length) if length.isdigit() else None
    if expected is not None and expected > limit and not cut:
        raise FetchError("too_large", status=status)
    body = _within(limit, _body(response, limit, deadline), cut)
    if expected is not None and len(body) < min(expected, limit) and not response.chunked:
        raise FetchError("truncated", transient=True, status=status)
    return Answer(status, headers, _within(limit, _decoded(body, headers, limit), cut), url)


def _within(limit: int, body: bytes, cut: bool) -> bytes:
    if len(body) > limit and not cut:
        raise FetchError("too_large", status=200)
    return body[:limit]


def _body(response: http.client.HTTPResponse, limit: int, deadline: float) -> bytes:
    """The body, or a little more of it than `limit` bytes."""
    blocks, size = [], 0
    try:
        # read1 gives what has arrived, so that the deadline is looked at between the drops of a drip.
        while size <= limit and (block := response.read1(_BLOCK)):
            blocks.append(block)
            size += len(block)
            if time.monotonic() > deadline:
                raise FetchError("timeout", transient=True, status=response.status)
    except http.client.IncompleteRead as error:
        raise FetchError("truncated", transient=True, status=response.status) from error
    return b"".join(blocks)


def _decoded(body: bytes, headers: http.client.HTTPMessage, limit: int) -> bytes:
    """Undoes a Content-Encoding that was sent though it was not asked for, up to a byte more than `limit`."""
    encoding = headers.get("Content-Encoding", "identity").strip().lower()
    if encoding in ("identity", ""):
        return body
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise FetchError("content_encoding", status=200)
    inflater = zlib.decompressobj(wbits=47 if "gzip" in encoding else 15)
    try:
        return inflater.decompress(body, limit + 1)
    except zlib.error as error:
        raise FetchError("content_encoding", status=200) from error


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
