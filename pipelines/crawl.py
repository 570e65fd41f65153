"""Fetches one batch of URLs: img2dataset in a subprocess with a hard limit, its statistics verified."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.guard import FetchPolicy
from starflow.config import Config
from starflow.errors import StarflowError
from starflow.urls import host_of, site_of

#: What a site says about its content, as opposed to a failure: recorded as an opt-out, never asked again.
OPT_OUT_REASONS = frozenset(("x_robots_tag", "tdm_reservation", "robots_txt"))
#: Why a URL was not asked for at all, or not to its end; that says nothing about it and counts as no attempt.
UNASKED = frozenset(("batch_time_limit", "crawl_lost", "host_busy", "robots_unavailable"))

#: One row per URL; `shard`, `offset` and `size` say where its original bytes lie.
OUTCOME = pa.schema(
    [
        ("row", pa.int64()),
        ("status", pa.string()),  # ok, unchanged, opt_out, retry, failed
        ("reason", pa.string()),
        ("http", pa.int16()),
        ("retry_after", pa.float32()),
        ("etag", pa.string()),
        ("last_modified", pa.string()),
        ("id", pa.string()),
        ("phash", pa.int64()),
        ("format", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("spread", pa.float32()),
        ("shard", pa.int32()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
    ]
)

#: What the subprocess sees of our environment: no credentials, whatever they are called, and no proxies.
_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "PYTHONPATH", "SSL_CERT_FILE", "SSL_CERT_DIR")
_START_SECONDS = 120.0
#: img2dataset sometimes hangs at its end: without progress for so long, and a few fetches, a batch is stopped.
_STALL_SECONDS = 120.0
#: What writing fails with when the disk is full, a quota is used up, or files may not be larger.
FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
#: How the crawl processes end each other when they meet that: img2dataset would hang, or lose URLs.
FULL_SIGNAL = signal.SIGUSR1
#: A disk with less free space counts as full: img2dataset neither ends nor says so when it cannot write.
_ROOM_BYTES = 2**16
#: A picture that was being looked at for longer when its batch had to be stopped hangs the decoder, or has ended it.
_INSPECTION_SECONDS = 60.0
#: URLs that are worth the start of another process.
_PROCESS_ROWS = 256


class CrawlJob(Config):
    """One batch: folders of the input Parquet files and of the output, and how to fetch."""

    input: str
    output: str
    rules_cache: str
    processes: int
    threads: int
    shard_rows: int
    policy: FetchPolicy


def fetch_batch(
    urls: pa.Table,
    policy: FetchPolicy,
    processes: int,
    threads: int,
    folder: Path,
    rules_cache: Path,
    on_progress: Callable[[int], None] = lambda done: None,
    limit: float | None = None,
) -> pa.Table:
    """Fetches `urls` (columns url, etag, last_modified) into `folder` and returns one OUTCOME row each, in order.

    Original bytes of shard s lie in ``folder/output/<s:05d>.bin``. The subprocess is stopped after `limit` seconds
    (default: what the slowest permitted answers take) or when it hangs; what it had not finished is to be retried,
    without the pictures that stopped it.
    Raises StarflowError when it ends without any result at all, OSError (ENOSPC) when the disk under `folder` is full.
    """
    processes = min(processes, -(-len(urls) // _PROCESS_ROWS))
    shards = _split(urls, policy, processes)
    job = CrawlJob(
        input=str(folder / "input"),
        output=str(folder / "output"),
        rules_cache=str(rules_cache),
        processes=len(shards),
        threads=threads,
        shard_rows=max(2, *(len(rows) for rows in shards)),
        policy=policy,
    )
    (folder / "input").mkdir(parents=True)
    for index, rows in enumerate(shards):
        shard = urls.take(rows).select(["url", "etag", "last_modified"])
        pq.write_table(shard.append_column("row", pa.array(rows)), folder / "input" / f"{index:05d}.parquet")
    (folder / "job.json").write_text(job.model_dump_json(), encoding="utf-8")
    timed_out = _run(
        folder, on_progress, limit or _limit(urls, policy, processes * threads), _STALL_SECONDS + 4 * policy.seconds
    )
    reason = "batch_time_limit" if timed_out else "crawl_lost"
    outcomes = pa.concat_tables(_outcomes(folder / "output", index, rows, reason) for index, rows in enumerate(shards))
    if not timed_out and set(outcomes["reason"].to_pylist()) == {reason}:
        raise StarflowError(
            f"the crawl subprocess ended without a result: {_last_line(folder / 'crawl.log')}; "
            "run `starflow doctor`, and check free space and memory"
        )
    return outcomes.sort_by("row")


def _split(urls: pa.Table, policy: FetchPolicy, processes: int) -> list[np.ndarray]:
    """Row numbers per process. A site is asked by one process only, because limits per host are counted in a process;
    rows of the operator's own hosts, which have no limit, are dealt evenly."""
    own = _own_hosts(policy)
    hosts = [host_of(url) for url in urls["url"].to_pylist()]
    owners = np.array([row if host in own else zlib.crc32(site_of(host).encode()) for row, host in enumerate(hosts)])
    shards = [np.flatnonzero(owners % processes == index) for index in range(processes)]
    return [rows for rows in shards if len(rows)]


def _own_hosts(policy: FetchPolicy) -> set[str]:
    return {entry.rsplit(":", 1)[0] if entry.count(":") == 1 else entry for entry in policy.allow_host}


def _limit(urls: pa.Table, policy: FetchPolicy, threads: int) -> float:
    """Seconds for a batch in which every URL uses all its time and the busiest host its whole rate, and a half more."""
    own = _own_hosts(policy)
    hosts = Counter(host for host in map(host_of, urls["url"].to_pylist()) if host not in own)
    busiest = max(hosts.values(), default=0)
    at_rate = busiest / policy.host_rate if policy.host_rate else 0.0
    in_turn = policy.seconds * max(-(-len(urls) // threads), -(-busiest // policy.host_concurrency))
    return _START_SECONDS + 1.5 * (at_rate + in_turn + 3 * policy.seconds)


def _run(folder: Path, on_progress: Callable[[int], None], limit: float, stall: float) -> bool:
    """Runs the job to its end; True when it had to be stopped, after `limit` seconds or `stall` without progress."""
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    environment |= {
        "NO_ALBUMENTATIONS_UPDATE": "1",
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "disabled",
        "RES_OPTIONS": "timeout:3 attempts:2",  # glibc's resolver has no other bound
    }
    deadline, moved, done = time.monotonic() + limit, time.monotonic(), 0
    code = "import sys; from pipelines.crawl_worker import main; main(sys.argv[1])"
    with (folder / "crawl.log").open("wb") as log:
        # A session of its own, so that all its processes can be stopped together; it watches its stdin
        # and stops by itself when this process is gone.
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(folder / "job.json")],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            while time.monotonic() < min(deadline, moved + stall):
                try:
                    process.wait(timeout=0.2)
                except subprocess.TimeoutExpired:
                    _check_room(folder)
                    if (now_done := _done(folder / "output")) > done:
                        done, moved = now_done, time.monotonic()
                    on_progress(done)
                else:
                    _check_room(folder, process.returncode == -FULL_SIGNAL)
                    return False
            return True
        finally:
            _stop(process)


def _check_room(folder: Path, is_full: bool = False) -> None:
    if is_full or shutil.disk_usage(folder).free < _ROOM_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def _stop(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):  # ended by itself, with all its children
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _done(output: Path) -> int:
    return sum(int(path.read_text() or 0) for path in output.glob("*.done"))


def _outcomes(output: Path, index: int, rows: np.ndarray, reason: str) -> pa.Table:
    """The shard's outcomes, one for each of `rows`.

    img2dataset's statistics must account for every URL as its outcomes do. Of a shard that did not get so far, what
    was finished counts as far as its bytes have the hash they should have; the rest failed for `reason`, except for the
    picture that stopped it, which is not asked for again.
    """
    records = {record["row"]: record | {"shard": index} for record in _lines(output / f"{index:05d}.jsonl")}
    if not _accounted(output / f"{index:05d}_stats.json", records, rows):
        blob = output / f"{index:05d}.bin"
        whole = {row: record for row, record in records.items() if _is_whole(blob, record)}
        lost = {row: {"row": row, "status": "retry", "reason": reason, "http": 0} for row in rows.tolist()}
        if (culprit := _culprit(output / f"{index:05d}.inspecting")) is not None:
            lost[culprit] |= {"status": "failed", "reason": "stops_the_decoder", "http": 200}
        return pa.Table.from_pylist(list((lost | whole).values()), OUTCOME)
    return pa.Table.from_pylist(list(records.values()), OUTCOME)


def _culprit(mark: Path) -> int | None:
    """The row of the picture that the shard's process was looking at for too long, alive or not."""
    row, since = (mark.read_text() if mark.exists() else "").split() or (0, math.inf)
    return int(row) if time.monotonic() - float(since) > _INSPECTION_SECONDS else None


def _lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSON-lines file that may have been cut off."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def _accounted(stats_file: Path, records: dict[int, dict[str, Any]], rows: np.ndarray) -> bool:
    try:
        stats = json.loads(stats_file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    successes = sum(record["status"] == "ok" for record in records.values())
    return (stats["count"], stats["successes"]) == (len(rows), successes) and sorted(records) == rows.tolist()


def _is_whole(blob: Path, record: dict[str, Any]) -> bool:
    if record["status"] != "ok":
        return True
    with blob.open("rb") as file:
        file.seek(record["offset"])
        return hashlib.sha256(file.read(record["size"])).hexdigest() == record["id"]


def _last_line(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace")
    errors = re.findall(r"^\w*(?:Error|Exception)\b.*", text, re.MULTILINE)
    return (errors or text.strip().splitlines() or ["it printed nothing"])[-1]
