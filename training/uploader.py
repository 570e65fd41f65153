"""Uploads from a process of its own: hashing and sending inside the trainer would slow its steps.

The trainer and the uploader share anonymous memory. Requests and replies are lines of JSON on the child's
stdin and stdout; the child exits when its stdin closes, so it never outlives the trainer.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import queue
import selectors
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from starflow import manifest
from starflow.checkpoints import KIND, VERSION
from starflow.errors import StarflowError, StoreError
from starflow.manifest import ObjectRef
from starflow.objectstore import ObjectStore, open_store
from training.lease import Lease
from training.retention import prune


class UploaderDied(StoreError):
    """The uploader process ended before it answered; the shared memory is intact, so it can be asked again."""


class Uploader:
    """The trainer's side. One request at a time, from one thread."""

    def __init__(self, store: str, memory: int, size: int) -> None:
        self._command = [sys.executable, "-m", "training.uploader", store, str(memory), str(size)]
        self._memory = memory
        self._process = self._start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def upload(self, objects: list[dict[str, Any]], files: list[dict[str, Any]], timeout: float) -> list[ObjectRef]:
        """Stores ranges of the shared memory (key, offset, size) and beginnings of files (key, path, size)."""
        refs = self._ask({"do": "upload", "objects": objects, "files": files}, timeout)
        return [ObjectRef.model_validate(ref) for ref in refs]

    def commit(self, request: dict[str, Any], timeout: float) -> str | None:
        """Creates a checkpoint's manifest if the lease still holds; see `_commit`. A remark if tidying up failed."""
        remark: str | None = self._ask({"do": "commit", **request}, timeout)
        return remark

    def close(self) -> None:
        """Lets the child end; kills it if it does not."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(self._memory,), bufsize=0
        )

    def _ask(self, request: dict[str, Any], timeout: float) -> Any:
        if self._process.poll() is not None:
            self._process = self._start()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            reply = json.loads(self._read_line(timeout))
        except (BrokenPipeError, ValueError) as error:
            self.close()
            raise UploaderDied(f"the uploader (process {self.pid}) ended with {self._process.returncode}") from error
        if "error" in reply:
            raise StoreError(reply["error"])
        return reply["ok"]

    def _read_line(self, timeout: float) -> bytes:
        """One line; b"" when the child is gone. Raises StoreError after `timeout` seconds."""
        assert self._process.stdout is not None
        deadline, line = time.monotonic() + timeout, b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    self._process.kill()
                    raise StoreError(f"no answer from the store within {timeout:.0f} s; see save_timeout")
                block = os.read(self._process.stdout.fileno(), 2**20)
                if not block:
                    return b""
                line += block
        return line


def serve(store: ObjectStore, memory: memoryview) -> None:
    """The child's loop: answers every request with {"ok": ...} or {"error": sentence}."""
    handlers = {"upload": _upload, "commit": _commit}
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(requests,), daemon=True).start()
    while True:
        request = json.loads(requests.get())
        try:
            reply = {"ok": handlers[request.pop("do")](store, memory, request)}
        except (StarflowError, OSError) as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


def _receive(requests: queue.SimpleQueue[bytes]) -> None:
    """Passes requests on; ends the process, even in the middle of an upload, when the trainer is gone."""
    for line in sys.stdin.buffer:
        requests.put(line)
    os._exit(0)


def _upload(store: ObjectStore, memory: memoryview, request: dict[str, Any]) -> list[dict[str, Any]]:
    ranges = ((item["key"], memory[item["offset"] : item["offset"] + item["size"]]) for item in request["objects"])
    files = ((item["key"], memoryview(_beginning(item))) for item in request["files"])
    return [manifest.put(store, key, data).model_dump() for key, data in (*ranges, *files)]


def _commit(store: ObjectStore, memory: memoryview, request: dict[str, Any]) -> str | None:
    """Commits `key` with `body` under the lease of `owner`; then refreshes the metrics' readable copy, prunes."""
    lease = Lease(store, request["run"], request["owner"])
    lease.commit(request["key"], request["draft"], manifest.encode(KIND, VERSION, request["body"]))
    try:
        lease.check()  # the copy is the present writer's
        store.write(f"runs/{request['run']}/metrics.jsonl", _beginning(request["metrics"]))
        prune(store, request["run"], request["keep_newest"], request["keep_every"])
    except StarflowError as error:
        return f"the checkpoint is committed, but tidying up failed: {error}"
    return None


def _beginning(item: dict[str, Any]) -> bytes:
    with Path(item["path"]).open("rb") as file:
        return file.read(item["size"])


def main() -> None:
    """``python -m training.uploader STORE FD SIZE``, started by `Uploader`."""
    os.nice(5)  # training goes first
    url, descriptor, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with mmap.mmap(descriptor, size, access=mmap.ACCESS_READ) as shared, memoryview(shared) as memory:
        serve(open_store(url), memory)


if __name__ == "__main__":
    main()
