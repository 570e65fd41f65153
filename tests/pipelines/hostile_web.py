"""A web server that does what servers should not, and a list of what a crawl must make of each of its answers.

It speaks HTTP over raw sockets on a free loopback port, because proper servers refuse to misbehave like this.
"""

from __future__ import annotations

import gzip
import io
import socket
import socketserver
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import numpy as np
from PIL import Image, ImageCms

Handler = Callable[[socket.socket, str], None]
OK = "HTTP/1.1 200 OK"
FOREVER = 60.0


@dataclass(frozen=True)
class Case:
    """A URL (``{base}`` is the server's address, ``{port}`` its port) and the outcome: status and reason."""

    name: str
    url: str
    status: str = "ok"
    reason: str = ""
    handler: Handler | None = None


def pixels(seed: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A picture that survives compression: a coarse random mosaic, (height, width, 3) uint8."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return blocks.repeat(-(-height // 6), 0).repeat(-(-width // 8), 1)[:height, :width]


def picture(kind: str = "PNG", mode: str = "RGB", seed: int = 0, **options: Any) -> bytes:
    """An encoded picture of 64 x 48 pixels."""
    image = Image.fromarray(pixels(seed)).convert(mode)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def response(body: bytes, *headers: str, status: str = OK, length: int | None = None) -> bytes:
    """A whole response; `length` may lie."""
    size = len(body) if length is None else length
    return "\r\n".join((status, f"Content-Length: {size}", *headers, "", "")).encode("latin-1") + body


def answers(data: bytes) -> Handler:
    """Sends the bytes and closes."""
    return lambda connection, request: connection.sendall(data)


def drips(head: bytes, drop: bytes, pause: float) -> Handler:
    """Sends `head`, then `drop` after each pause, for ever."""

    def handler(connection: socket.socket, request: str) -> None:
        connection.sendall(head)
        deadline = time.monotonic() + FOREVER
        while time.monotonic() < deadline:
            connection.sendall(drop)
            if pause:
                time.sleep(pause)

    return handler


def silent(connection: socket.socket, request: str) -> None:
    """Never answers; returns when the client gives up."""
    connection.settimeout(FOREVER)
    connection.recv(1)


def etag(connection: socket.socket, request: str) -> None:
    """Answers 304 to a conditional request."""
    if 'if-none-match: "v1"' in request.lower():
        connection.sendall(b"HTTP/1.1 304 Not Modified\r\n\r\n")
    else:
        connection.sendall(response(picture(seed=7), 'ETag: "v1"'))


def etag_opt_out(connection: socket.socket, request: str) -> None:
    """Answers 304 to a conditional request, and that it has opted out meanwhile."""
    connection.sendall(b"HTTP/1.1 304 Not Modified\r\nX-Robots-Tag: noai\r\n\r\n")


def wants_cookie(connection: socket.socket, request: str) -> None:
    """Redirects to itself until a cookie comes back, which it never does."""
    if "cookie:" in request.lower():
        connection.sendall(response(picture()))
    else:
        path = request.split(" ", 2)[1]
        connection.sendall(response(b"", f"Location: {path}", "Set-Cookie: a=b", status="HTTP/1.1 302 Found"))


def _sixteen_bit() -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(1)[..., 0].astype(np.uint16) * 257).save(file, "PNG")
    return file.getvalue()


def _rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture("JPEG", exif=exif)


def _profiled() -> bytes:
    return picture("JPEG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())


def _animation(frames: int) -> bytes:
    images = [Image.fromarray(pixels(seed, 12, 16)) for seed in range(frames)]
    file = io.BytesIO()
    images[0].save(file, "GIF", save_all=True, append_images=images[1:])
    return file.getvalue()


def _thin() -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(3, 1, 20_000)).save(file, "PNG")
    return file.getvalue()


def _enormous() -> bytes:
    """A PNG whose header promises 30,000 x 30,000 pixels."""
    data = bytearray(picture())
    data[16:24] = (30_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def _chunked(body: bytes, end: bool = True) -> bytes:
    head = f"{OK}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    return head + f"{len(body):x}\r\n".encode() + body + b"\r\n" + (b"0\r\n\r\n" if end else b"")


def _redirect(target: str, status: str = "302 Found") -> bytes:
    return response(b"", f"Location: {target}", status=f"HTTP/1.1 {status}")


#: A host that the crawl is told never to ask.
BLOCKED_HOST = "blocked.example"
SVG = b"<svg xmlns='http://www.w3.org/2000/svg' width='64' height='64'><script>alert(1)</script></svg>"
HTML = b"<!doctype html><title>no picture</title>"
CHUNKS = f"{OK}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()


def _served() -> list[Case]:
    """Cases that the server answers, each under its own path."""
    table: list[tuple[str, str, str, Handler]] = []

    def add(name: str, status: str, reason: str, handler: Handler | bytes) -> None:
        table.append((name, status, reason, answers(handler) if isinstance(handler, bytes) else handler))

    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        add(kind.lower(), "ok", "", response(picture(kind)))
    add("cmyk", "ok", "", response(picture("JPEG", "CMYK")))
    add("palette", "ok", "", response(picture("PNG", "P")))
    add("alpha", "ok", "", response(picture("PNG", "RGBA")))
    add("grey-16-bit", "ok", "", response(_sixteen_bit()))
    add("rotated", "ok", "", response(_rotated()))
    add("icc-profile", "ok", "", response(_profiled()))
    add("animated", "ok", "", response(_animation(5)))
    add("too-animated", "failed", "too_many_frames", response(_animation(40)))
    add("thin", "ok", "", response(_thin()))
    add("wrong-type", "ok", "", response(picture(), "Content-Type: text/html"))
    add("no-length", "ok", "", f"{OK}\r\n\r\n".encode() + picture())
    add("chunked", "ok", "", _chunked(picture()))
    add("gzip", "ok", "", response(gzip.compress(picture()), "Content-Encoding: gzip"))
    add("redirect", "ok", "", _redirect("/png"))
    add("redirect-307", "ok", "", _redirect("png", "307 Temporary Redirect"))
    add("unicode-\u00fc", "ok", "", response(picture()))
    add("a b,c;d'e", "ok", "", response(picture()))
    add("empty", "failed", "empty", response(b""))
    add("html", "failed", "not_an_image", response(HTML, "Content-Type: image/png"))
    add("svg", "failed", "not_an_image", response(SVG, "Content-Type: image/svg+xml"))
    add("half-file", "failed", "corrupt", response(picture()[: len(picture()) // 2]))
    add("enormous", "failed", "too_many_pixels", response(_enormous()))
    add("cut", "retry", "truncated", response(picture()[:100], length=5000))
    add("chunk-cut", "retry", "truncated", _chunked(picture(), end=False))
    add("drip", "retry", "timeout", drips(response(b"", length=10**6), b"x", 0.1))
    add("slow-headers", "retry", "timeout", drips(f"{OK}\r\nX-Slow: ".encode(), b"x", 0.1))
    add("silent", "retry", "timeout", silent)
    add("hangs-up", "retry", "connection", b"")
    add("no-http", "failed", "protocol", b"SSH-2.0-OpenSSH_9.2\r\n")
    add("endless-chunks", "failed", "too_large", drips(CHUNKS, b"8000\r\n" + bytes(0x8000) + b"\r\n", 0))
    add("endless-body", "failed", "too_large", drips(f"{OK}\r\n\r\n".encode(), bytes(2**16), 0))
    add("bad-chunk", "retry", "truncated", CHUNKS + b"zz\r\n")
    add("announced-large", "failed", "too_large", response(picture(), length=10**9))
    add("gzip-bomb", "failed", "too_large", response(gzip.compress(bytes(3 * 2**20)), "Content-Encoding: gzip"))
    add("broken-gzip", "failed", "content_encoding", response(picture(), "Content-Encoding: gzip"))
    add("brotli", "failed", "content_encoding", response(picture(), "Content-Encoding: br"))
    add("long-header", "failed", "protocol", f"{OK}\r\nX: {'x' * 70_000}\r\n\r\n".encode())
    add("many-headers", "failed", "protocol", (f"{OK}\r\n" + "X: y\r\n" * 200 + "\r\n").encode())
    for status in (401, 403, 404, 410, 451):
        add(f"status-{status}", "failed", f"http_{status}", response(b"no", status=f"HTTP/1.1 {status} No"))
    for status in (500, 501, 511, 530):
        add(f"status-{status}", "retry", f"http_{status}", response(b"", status=f"HTTP/1.1 {status} Oops"))
    busy = response(b"", "Retry-After: 120", status="HTTP/1.1 503 Busy")
    add("status-503", "retry", "http_503", busy)
    add("status-429", "retry", "http_429", busy.replace(b"503 Busy", b"429 Slow down"))
    add("redirect-loop", "failed", "redirects", _redirect("/redirect-loop"))
    add("redirect-nowhere", "failed", "http_302", response(b"", status="HTTP/1.1 302 Found"))
    add("redirect-private", "failed", "private_address", _redirect("http://10.0.0.1/a.png"))
    add("redirect-decimal", "failed", "private_address", _redirect("http://2130706433/a.png"))
    add("redirect-metadata", "failed", "private_address", _redirect("http://169.254.169.254/latest/meta-data"))
    add("redirect-file", "failed", "scheme", _redirect("file:///etc/passwd"))
    add("redirect-broken", "failed", "bad_url", _redirect("http://["))
    add("redirect-utf-8", "ok", "", _redirect("/unicode-\u00fc".encode().decode("latin-1")))
    add("redirect-blocked", "failed", "blocked_host", _redirect(f"http://img.{BLOCKED_HOST}/a.png"))
    add("redirect-forbidden", "opt_out", "robots_txt", _redirect("/private/a.png"))
    add("cookie", "failed", "redirects", wants_cookie)
    for index, value in enumerate(
        (
            "noai",
            "noimageai",
            "NoML",
            "none",
            "all, noai",
            "starflow: noai",
            "unavailable_after: 1 Jan 2020 00:00:00 GMT",
        )
    ):
        add(f"opt-out-{index}", "opt_out", "x_robots_tag", response(picture(), f"X-Robots-Tag: {value}"))
    two = response(picture(), "X-Robots-Tag: all", "X-Robots-Tag: otherbot: noindex", "X-Robots-Tag: noai")
    add("opt-out-two-headers", "opt_out", "x_robots_tag", two)
    add("opt-out-tdm", "opt_out", "tdm_reservation", response(picture(), "TDM-Reservation: 1"))
    for index, value in enumerate(
        ("otherbot: noai", "unavailable_after: Fri, 01 Jan 2100 00:00:00 GMT", "max-snippet: 5")
    ):
        add(f"opted-in-{index}", "ok", "", response(picture(), f"X-Robots-Tag: {value}"))
    add("private/a.png", "opt_out", "robots_txt", response(picture()))
    add("verb\u00f6ten/a.png", "opt_out", "robots_txt", response(picture()))
    add("reserved/a.png", "opt_out", "tdm_reservation", response(picture()))
    add("etag", "unchanged", "unchanged", etag)
    add("etag-opt-out", "opt_out", "x_robots_tag", etag_opt_out)
    cases = [Case(name, f"{{base}}/{name}", status, reason, handler) for name, status, reason, handler in table]
    return [*cases, Case("50 % off", "{base}/50%20%25%20off", handler=answers(response(picture())))]


def _refused() -> list[Case]:
    """Cases that must not reach any server."""
    table = (
        ("file", "file:///etc/passwd", "scheme"),
        ("data", "data:image/png;base64,AAAA", "scheme"),
        ("ftp", "ftp://127.0.0.1/a.png", "scheme"),
        ("script", "javascript:alert(1)", "scheme"),
        ("nothing", "", "bad_url"),
        ("words", "not a url", "bad_url"),
        ("credentials", "http://user:secret@127.0.0.1:{port}/png", "bad_url"),
        ("bad-port", "http://127.0.0.1:99999/png", "bad_url"),
        ("broken-ipv6", "http://[::1/png", "bad_url"),
        ("localhost", "http://localhost:{port}/png", "private_address"),
        ("decimal", "http://2130706433:{port}/png", "private_address"),
        ("hexadecimal", "http://0x7f000001:{port}/png", "private_address"),
        ("octal", "http://0177.0.0.1:{port}/png", "private_address"),
        ("circled-digits", "http://\u2460\u24ea.\u2460.\u2461.\u2462/a.png", "private_address"),
        ("short", "http://127.1:{port}/png", "private_address"),
        ("zero", "http://0.0.0.0:{port}/png", "private_address"),
        ("ipv6", "http://[::1]:{port}/png", "private_address"),
        ("ipv6-mapped", "http://[::ffff:127.0.0.1]:{port}/png", "private_address"),
        ("ipv6-nat64", "http://[64:ff9b::7f00:1]:{port}/png", "private_address"),
        ("link-local", "http://169.254.169.254/latest/meta-data", "private_address"),
        ("ten", "http://10.1.2.3/a.png", "private_address"),
        ("shared", "http://100.64.0.1/a.png", "private_address"),
        ("multicast", "http://224.0.0.1/a.png", "private_address"),
    )
    return [Case(name, url, "failed", reason) for name, url, reason in table]


CASES = [*_served(), *_refused()]
#: Longer than a picture may be in these tests; its rules come first, one of them in UTF-8.
ROBOTS = "User-agent: *\nDisallow: /private/\nDisallow: /verb\u00f6ten/\nAllow: /\n".encode() + b"# longer\n" * 2**17
TDM = b'[{"location": "/reserved/*", "tdm-reservation": 1}]'


class HostileWeb:
    """Serves CASES; a context manager. `requests` counts paths."""

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self.agents: set[str] = set()
        routes = {f"/{case.name}": case.handler for case in CASES if case.handler}
        routes |= {"/robots.txt": answers(response(ROBOTS)), "/.well-known/tdmrep.json": answers(response(TDM))}
        web = self

        class Connection(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with suppress(OSError):
                    request = _head(self.request)
                    path = unquote(request.split(" ", 2)[1])
                    web.requests[path] += 1
                    web.agents |= {line for line in request.splitlines() if line.startswith("User-Agent")}
                    missing = answers(response(b"", status="HTTP/1.1 404 Not Found"))
                    routes.get(path, missing)(self.request, request)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            block_on_close = False
            request_queue_size = 256

        self.server = Server(("127.0.0.1", 0), Connection)
        self.port: int = self.server.server_address[1]
        self.base = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> HostileWeb:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def url(self, case: Case) -> str:
        """The case's URL on this server."""
        return case.url.replace("{base}", self.base).replace("{port}", str(self.port))


def _head(connection: socket.socket) -> str:
    data = b""
    while b"\r\n\r\n" not in data:
        block = connection.recv(65536)
        if not block:
            raise ConnectionError
        data += block
    return data.decode("latin-1")
