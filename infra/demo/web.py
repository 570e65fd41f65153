"""A small web to crawl: the emoji pictures over HTTP on loopback, with the hazards that the real web has.

``python -m infra.demo.web --root DIR --port 0 --ready-file FILE`` renders the pictures into DIR, writes two URL
lists there, serves until SIGTERM, and says where in FILE (JSON) once it listens. The first folder of a path
decides how it is answered, so every behaviour can be tried by hand; ``/__requests`` counts what was asked for.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from infra.demo.emoji import LICENCE, Emoji, emoji, write_pictures
from starflow.errors import StarflowError

#: What goes wrong, in the order in which hazards are dealt out: rarer ones are listed less often.
HAZARDS = (
    "missing",  # 404
    "flaky",  # 500 the first time, then the picture
    "copy",  # the bytes of another URL
    "optout",  # X-Robots-Tag: noai
    "page",  # HTML served as image/png
    "truncated",  # half of the file
    "private",  # a redirect to a private address
    "drip",  # a byte now and then, for ever
    "disallowed",  # robots.txt says no
    "missing",
    "flaky",
    "copy",
    "optout",
    "page",
    "truncated",
    "private",
    "missing",
    "flaky",
    "copy",
)
#: One picture in so many is a hazard.
HAZARD_EVERY = 33
#: Pictures that only the second list has.
ADDED = 300
FIRST, SECOND = "first.parquet", "second.parquet"
PRIVATE = "http://10.255.255.1/internal.png"
ROBOTS = b"User-agent: *\nDisallow: /disallowed/\n"
HTML = b"<!doctype html><title>Not a picture</title><p>The picture has moved.</p>"


@dataclass(frozen=True)
class Link:
    """One line of a URL list: the path on the server, the alt text, the hazard's name or `emoji` for none."""

    path: str
    caption: str
    kind: str


def links(pictures: Sequence[tuple[Path, Emoji]], hazard_every: int = HAZARD_EVERY) -> list[Link]:
    """The links to `pictures`, in order; each `hazard_every`-th picture is a hazard, and copies are lines more."""
    result = []
    for index, (file, item) in enumerate(pictures):
        turn, last = divmod(index + 1, hazard_every)
        kind = HAZARDS[(turn - 1) % len(HAZARDS)] if last == 0 else "emoji"
        name = f"{item.base}/{file.name}"
        if kind == "copy":
            result.append(Link(f"/emoji/{name}", item.caption, "emoji"))
        result.append(Link(f"/{kind}/{name}", item.caption, kind))
    return result


def write_list(file: Path, url: str, lines: Sequence[Link]) -> None:
    """Writes `lines` as a Parquet URL list: columns url, caption, licence."""
    table = pa.table(
        {
            "url": [url + line.path for line in lines],
            "caption": [line.caption for line in lines],
            "licence": [LICENCE] * len(lines),
        }
    )
    pq.write_table(table, file)


class Server:
    """Answers GET and HEAD from memory, with keep-alive, and counts requests by path."""

    def __init__(self, pictures: dict[str, bytes]) -> None:
        self.pictures = pictures
        self.requests: Counter[str] = Counter()

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves one connection until the client closes it or asks for that."""
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            keep = True
            while keep:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                method, _, rest = head.partition(" ")
                path = rest.partition(" ")[0]
                keep = "connection: close" not in head.lower() and " HTTP/1.1\r\n" in head
                if path.startswith("/drip/"):
                    self.requests[path] += 1
                    await self._drip(writer)
                    break
                writer.write(self.answer(method, path))
                await writer.drain()
        writer.close()

    def answer(self, method: str, path: str) -> bytes:
        """The whole response to a request, head and body."""
        if method not in ("GET", "HEAD"):
            return _response(HTTPStatus.METHOD_NOT_ALLOWED)
        if path == "/__requests":
            counts = json.dumps({"total": self.requests.total(), "paths": dict(self.requests)}).encode()
            return _response(HTTPStatus.OK, counts, "application/json", head=method == "HEAD")
        self.requests[path] += 1
        status, body, extra = self._picture(path)
        kind = "text/plain" if path == "/robots.txt" else "image/png"
        return _response(status, body, kind, *extra, head=method == "HEAD")

    def _picture(self, path: str) -> tuple[HTTPStatus, bytes, tuple[str, ...]]:
        if path == "/robots.txt":
            return HTTPStatus.OK, ROBOTS, ()
        kind, _, name = path[1:].partition("/")
        body = self.pictures.get(name)
        if body is None or kind == "missing" or kind not in (*HAZARDS, "emoji"):
            return HTTPStatus.NOT_FOUND, b"", ()
        if kind == "flaky" and self.requests[path] == 1:
            return HTTPStatus.INTERNAL_SERVER_ERROR, b"", ()
        if kind == "private":
            return HTTPStatus.FOUND, b"", (f"Location: {PRIVATE}",)
        body = {"page": HTML, "truncated": body[: len(body) // 2]}.get(kind, body)
        return HTTPStatus.OK, body, ("X-Robots-Tag: noai",) if kind == "optout" else ()

    async def _drip(self, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: 100000\r\n\r\n\x89PNG\r\n\x1a\n")
        for _ in range(100_000):
            await writer.drain()
            await asyncio.sleep(0.2)
            writer.write(b"\0")


def _response(
    status: HTTPStatus, body: bytes = b"", kind: str = "text/plain", *extra: str, head: bool = False
) -> bytes:
    lines = (
        f"HTTP/1.1 {status.value} {status.phrase}",
        f"Content-Type: {kind}",
        f"Content-Length: {len(body)}",
        *extra,
    )
    return "\r\n".join((*lines, "", "")).encode() + (b"" if head else body)


@dataclass(frozen=True)
class Web:
    """A running server. The second of the two lists is the first and the rest of the pictures."""

    process: subprocess.Popen[bytes]
    address: str
    lists: tuple[Path, Path]
    pictures: int
    hazard_kinds: dict[str, int]

    @property
    def hazards(self) -> int:
        """Lines of the second list that are hazards."""
        return sum(self.hazard_kinds.values())

    def requests(self) -> Counter[str]:
        """Requests so far, by path (robots.txt is one of them)."""
        with urllib.request.urlopen(f"{self.address}/__requests", timeout=30) as answer:
            return Counter(json.load(answer)["paths"])

    def stop(self) -> None:
        """Stops exactly that process."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


async def serve(root: Path, port: int, ready_file: Path, limit: int | None, hazard_every: int, second: int) -> None:
    """Renders, listens, writes the lists and `ready_file`, and serves until SIGTERM or SIGINT."""
    pictures = write_pictures(root / "pictures", limit)
    bodies = {f"{item.base}/{file.name}": file.read_bytes() for file, item in pictures}
    connection = Server(bodies).connection
    try:
        server = await asyncio.start_server(connection, "127.0.0.1", port, backlog=1024)
    except OSError:  # somebody else took the port since the last time
        server = await asyncio.start_server(connection, "127.0.0.1", 0, backlog=1024)
    address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    everything = links(pictures, hazard_every)
    write_list(root / FIRST, address, links(pictures[: max(1, len(pictures) - second)], hazard_every))
    write_list(root / SECOND, address, everything)
    hazards = Counter(line.kind for line in everything if line.kind != "emoji")
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    partial = ready_file.with_suffix(".partial")
    partial.write_text(json.dumps({"address": address, "pictures": len(pictures), "hazard_kinds": hazards}))
    partial.rename(ready_file)
    await stopped.wait()
    server.close()


def start_web(
    root: Path,
    limit: int | None = None,
    hazard_every: int = HAZARD_EVERY,
    second: int = ADDED,
    seconds: float = 120,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Web:
    """Starts the server in a process of its own; returns when it listens. The caller stops it.

    It listens where it did the last time, if it can: another port would make every URL a new one.
    Calls `on_progress(pictures drawn, pictures in all)` while it waits. Raises StarflowError when it does not
    listen within `seconds`; its output is in `root`/web.log.
    """
    root.mkdir(parents=True, exist_ok=True)
    ready, log = root / "ready.json", root / "web.log"
    port = json.loads(ready.read_text())["address"].rpartition(":")[2] if ready.exists() else "0"
    ready.unlink(missing_ok=True)
    command = [sys.executable, "-m", "infra.demo.web", "--root", str(root), "--ready-file", str(ready), "--port", port]
    command += ["--hazard-every", str(hazard_every), "--second", str(second)]
    command += ["--limit", str(limit)] if limit is not None else []
    total = len(emoji()[:limit])
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + seconds
    while not ready.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            process.wait()
            last = log.read_text().strip().splitlines()[-1:] or ["it printed nothing"]
            raise StarflowError(f"the demo's web server did not start: {last[0]} (see {log})")
        on_progress(sum(1 for _ in root.glob("pictures/*/*.png")), total)
        time.sleep(0.2)
    return Web(process=process, lists=(root / FIRST, root / SECOND), **json.loads(ready.read_text()))


def main() -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Serve the emoji pictures on loopback.")
    parser.add_argument("--root", type=Path, required=True, help="folder for the pictures and the URL lists")
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1; 0 takes a free one")
    parser.add_argument("--ready-file", type=Path, required=True, help="JSON file written once it listens")
    parser.add_argument("--limit", type=int, help="serve only so many pictures")
    parser.add_argument("--hazard-every", type=int, default=HAZARD_EVERY, help="one picture in so many is a hazard")
    parser.add_argument("--second", type=int, default=ADDED, help="pictures that only the second list has")
    options = parser.parse_args()
    try:
        asyncio.run(serve(**vars(options)))
    except (OSError, StarflowError) as error:
        print(f"error: the demo's web server on 127.0.0.1:{options.port}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
