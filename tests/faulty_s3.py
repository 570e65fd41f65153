"""A proxy in front of a real S3 server that does to requests what networks and full disks do.

    with FaultyS3(endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        proxy.only, proxy.count = r"^PUT .*/snapshots/", 1
        proxy.mode = "lost"

Set `mode` last: the other attributes say which requests it befalls.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from starflow.objectstore import ObjectStore
from starflow.s3store import S3Store

#: What can be done to a request.
MODES = {
    "": "passed on and answered",
    "down": "the connection is reset, nothing is passed on",
    "hang": "never answered, nothing is passed on, until the mode changes",
    "slow": "passed on and answered at `rate` bytes a second in both directions",
    "lost": "executed, but its answer never arrives: the connection is reset",
    "503": "answered with SlowDown, nothing is passed on",
    "507": "writes are answered as by a full store, reads are passed on",
    "denied": "answered as by a server that does not know the key",
    "flip": "one byte in the middle of what is uploaded or downloaded is another one",
}
_ANSWERS = {
    "503": (503, "SlowDown", "Please reduce your request rate."),
    "507": (507, "XMinioStorageFull", "Storage backend has reached its minimum free drive threshold."),
    "denied": (403, "InvalidAccessKeyId", "The access key ID you provided does not exist in our records."),
}
_WRITES = ("PUT", "POST")
#: Headers of one connection, which the next one has its own of.
_HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "content-length"}
_TICKS = 20  # pieces a second of a slow transfer


class FaultyS3:
    """Passes S3 requests on to `upstream` (a URL) from its own `endpoint`; a context manager.

    `mode` is one of MODES. It befalls the requests whose ``METHOD /path?query`` matches the regular expression `only`
    (None: all), after the first `after` of them have passed, and `count` times (None: until it is changed); then the
    mode is "" again. `requests` lists every request, `struck` how many have met with the mode since it was set.
    """

    def __init__(self, upstream: str) -> None:
        self.upstream = urlsplit(upstream)
        self.only: str | None = None
        self.count: int | None = None
        self.after, self.rate = 0, 10_000.0
        self.requests: list[str] = []
        self.struck = 0
        self._mode, self._changed, self._lock = "", threading.Event(), threading.Lock()
        proxy = self

        class Relay(_Relay):
            faults = proxy

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Relay, bind_and_activate=False)
        self.server.daemon_threads, self.server.block_on_close = True, False
        self.server.request_queue_size = 128
        self.server.server_bind()
        self.server.server_activate()
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> FaultyS3:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.mode = ""
        self.server.shutdown()
        self.server.server_close()

    @property
    def mode(self) -> str:
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        if mode not in MODES:
            raise ValueError(f"mode {mode!r} is none of {', '.join(map(repr, MODES))}")
        with self._lock:
            self._set(mode)
            self.struck = 0

    def _set(self, mode: str) -> None:
        self._mode = mode
        self._changed.set()  # those that hang are let go
        self._changed = threading.Event()

    def judge(self, request: str) -> tuple[str, threading.Event]:
        """(the mode that befalls this request, an event that is set when the mode changes)."""
        with self._lock:
            self.requests.append(request)
            mode, changed = self._mode, self._changed
            hit = mode and (self.only is None or re.search(self.only, request))
            if not hit or (mode == "507" and not request.startswith(_WRITES)):
                return "", changed
            if self.after > 0:
                self.after -= 1
                return "", changed
            self.struck += 1
            if self.count is not None:
                self.count -= 1
                if self.count <= 0:
                    self.count, self._mode = None, ""
            return mode, changed


@contextlib.contextmanager
def impatient(store: ObjectStore, seconds: float = 0.5) -> Iterator[None]:
    """Meanwhile that store is given up after so long: while it answers, a busy machine may take longer."""
    assert isinstance(store, S3Store)
    before = store.patience, store._clients_of
    store.patience, store._clients_of = seconds, None
    try:
        yield
    finally:
        store.patience, store._clients_of = before


class _Relay(BaseHTTPRequestHandler):
    """One connection of a client; http.server answers its Expect headers."""

    protocol_version = "HTTP/1.1"
    faults: FaultyS3

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def relay(self) -> None:
        """Takes one request, does to it what is to be done, passes it on, and answers."""
        mode, changed = self.faults.judge(f"{self.command} {self.path}")
        if mode == "hang":
            changed.wait()
        if mode in ("down", "hang"):
            self._reset()
            return
        body = self._body(mode)
        if mode in _ANSWERS:
            self._refuse(*_ANSWERS[mode])
            return
        uploaded = self.command in _WRITES
        status, headers, answer = self._forward(_flipped(body) if mode == "flip" and uploaded else body)
        if mode == "lost":
            self._reset()
            return
        self._answer(status, headers, _flipped(answer) if mode == "flip" and not uploaded else answer, mode)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = relay

    def _body(self, mode: str) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            return self._chunks()
        left, blocks = int(self.headers.get("Content-Length") or 0), []
        while left:
            block = self.rfile.read(min(left, self._piece(mode)))
            if not block:
                raise ConnectionError("the client hung up")
            blocks.append(block)
            left -= len(block)
            self._pause(mode)
        return b"".join(blocks)

    def _chunks(self) -> bytes:
        blocks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            blocks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            continue
        return b"".join(blocks)

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.faults.upstream.hostname or "", self.faults.upstream.port)
        try:
            # The Host header stays the client's, because it is part of what the client signed.
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP:
                    connection.putheader(name, value)
            if body or self.command in _WRITES:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body or None)
            response = connection.getresponse()
            return response.status, response.getheaders(), response.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, mode: str) -> None:
        length = next((value for name, value in headers if name.lower() == "content-length"), "0")
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in _HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(body)))
        self.end_headers()
        piece = self._piece(mode)
        for start in range(0, len(body), piece):
            self.wfile.write(body[start : start + piece])
            self._pause(mode)

    def _refuse(self, status: int, code: str, message: str) -> None:
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        self._answer(status, [("Content-Type", "application/xml")], b"" if self.command == "HEAD" else body, "")

    def _piece(self, mode: str) -> int:
        return max(1, int(self.faults.rate / _TICKS)) if mode == "slow" else 2**20

    def _pause(self, mode: str) -> None:
        if mode == "slow":
            time.sleep(1 / _TICKS)

    def _reset(self) -> None:
        """Ends the connection with a reset instead of an orderly close."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def handle(self) -> None:
        try:
            super().handle()
        except (OSError, ValueError, http.client.HTTPException):
            self.close_connection = True  # a side that hung up, or our own reset, is what this proxy is for

    def finish(self) -> None:
        try:
            super().finish()
        except OSError:
            self.rfile.close()


def _flipped(data: bytes) -> bytes:
    if not data:
        return data
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
