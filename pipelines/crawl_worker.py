"""The crawl subprocess: img2dataset with a guarded download in place of its own.

img2dataset shards the URLs, starts processes and threads and writes statistics; what fetches, inspects and stores a
picture is ours, because its own download follows redirects to private addresses, reads bodies of any size and waits
for any drip. The parent reads the outcome files, one per shard, and trusts nothing else: img2dataset's exit code says
little. Only crawl processes import this module.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import io
import json
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from datetime import UTC, datetime
from http.client import HTTPMessage
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.crawl import FULL, FULL_SIGNAL, OPT_OUT_REASONS, CrawlJob
from pipelines.guard import FetchError, FetchPolicy, get
from pipelines.inspection import Inspection, InspectionError, inspect_image
from pipelines.robots import opted_out
from pipelines.sites import Sites
from starflow.urls import host_of, site_of

# img2dataset imports these only if they are there, and only for what is not used here: without them each
# of its processes starts in half the time.
sys.modules.update(dict.fromkeys(("torch", "ray")))  # type: ignore[arg-type]

from img2dataset import downloader as img2dataset_downloader  # noqa: E402
from img2dataset.downloader import Downloader  # noqa: E402


@dataclass(frozen=True)
class Fetched:
    """A picture's bytes and what is known of it; travels through img2dataset in the place of encoded bytes."""

    data: bytes
    inspection: Inspection
    etag: str
    last_modified: str


class Failure(str):
    """An error message that img2dataset counts, with what the ledger needs to know about it."""

    error: FetchError

    def __new__(cls, error: FetchError) -> Failure:
        failure = super().__new__(cls, error.reason)
        failure.error = error
        return failure


class _Body(io.BytesIO):
    """A body as the stream that img2dataset hands from its download to its resizer, with the headers."""

    row: int  # of the batch

    def __init__(self, data: bytes, headers: HTTPMessage) -> None:
        super().__init__(data)
        self.headers = headers


def fetch_image(url: str, policy: FetchPolicy, sites: Sites, validators: dict[str, str]) -> _Body:
    """One polite, guarded fetch. Raises FetchError; reason ``unchanged`` for a 304."""
    now = datetime.now(UTC)

    def accept(headers: HTTPMessage) -> None:
        if opted_out(headers.get_all("X-Robots-Tag", []), policy.agent_token, policy.opt_out, now):
            raise FetchError("x_robots_tag", status=200)
        if policy.tdm and headers.get("TDM-Reservation", "").strip() == "1":
            raise FetchError("tdm_reservation", status=200)

    answer = get(url, policy, validators, sites.visit, accept)
    if answer.status == 304:
        raise FetchError("unchanged", status=304)
    return _Body(answer.body, answer.headers)


@functools.cache
def _sites(policy: FetchPolicy, cache: str, processes: int) -> Sites:
    return Sites(policy, Path(cache), processes)


class GuardedDownloader(Downloader):
    """img2dataset's downloader with its three outside contacts replaced: download, resizer, writer."""

    def __init__(self, job: CrawlJob, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.job, self.policy = job, job.policy
        self.resizer = self.inspect
        self.sample_writer_class = OutcomeWriter

    def download_shard(self, row: tuple[int, str]) -> None:
        """Runs in a process of the pool; there alone img2dataset's module is given our download."""
        with pa.ipc.open_file(row[1]) as file:
            shard = file.read_all()
        validators = list(zip(shard["etag"].to_pylist(), shard["last_modified"].to_pylist(), strict=True))
        rows = shard["row"].to_pylist()
        sites = _sites(self.policy, self.job.rules_cache, self.job.processes)
        sites.assigned.update(site_of(host_of(url)) for url in shard["url"].to_pylist())

        def download(sample: tuple[int, str], **_: Any) -> tuple[int, _Body | None, str | None]:
            key, url = sample
            etag, last_modified = validators[key]
            headers = {"If-None-Match": etag, "If-Modified-Since": last_modified}
            try:
                body = fetch_image(url, self.policy, sites, {k: v for k, v in headers.items() if v})
                body.row = rows[key]
                return key, body, None
            except FetchError as error:
                return key, None, Failure(error)
            except Exception as error:  # noqa: BLE001 - a URL that surprises us must not cost its whole shard
                return key, None, Failure(_unexpected(error))

        img2dataset_downloader.download_image_with_retry = download
        with (Path(self.output_folder) / f"{row[0]:05d}.inspecting").open("wb") as file:
            self.mark = file.fileno()
            super().download_shard(row)

    def inspect(self, body: _Body, _boxes: Any = None) -> tuple[Any, ...]:
        """In the place of img2dataset's resizer: keeps the original bytes. Runs on one thread of the process,
        so that one large picture at a time is in memory."""
        data = body.getvalue()
        try:
            # What the parent finds here when this process hangs or dies is the picture that it hangs or died of.
            os.pwrite(self.mark, f"{body.row} {time.monotonic()}".encode(), 0)
            inspection = inspect_image(data, self.policy.max_pixels, self.policy.max_frames)
        except InspectionError as error:
            return None, None, None, None, None, str(error)
        except Exception as error:  # noqa: BLE001 - nor must a picture
            return None, None, None, None, None, Failure(_unexpected(error))
        finally:
            os.ftruncate(self.mark, 0)
        fetched = Fetched(data, inspection, body.headers.get("ETag", ""), body.headers.get("Last-Modified", ""))
        width, height = inspection.width, inspection.height
        return fetched, width, height, width, height, None


def _end_if_full(error: Exception) -> None:
    """Ends all crawl processes at once when `error` says that nothing can be written any more."""
    if isinstance(error, OSError) and error.errno in FULL:
        os.killpg(os.getpgrp(), FULL_SIGNAL)


def _unexpected(error: Exception) -> FetchError:
    """A defect of ours: in the log with its traceback, and counted under its own reason."""
    _end_if_full(error)
    traceback.print_exception(error)
    return FetchError(f"unexpected_{type(error).__name__}")


class OutcomeWriter:
    """In the place of img2dataset's writer: original bytes into one file, one outcome a URL into JSON lines."""

    def __init__(self, shard_id: int, output_folder: str, *_: Any) -> None:
        self.base = Path(output_folder) / f"{shard_id:05d}"
        self.bytes = self.base.with_suffix(".bin").open("wb")
        self.lines = self.base.with_suffix(".jsonl").open("w", encoding="utf-8")
        self.count, self.reported = 0, 0.0

    def write(self, fetched: Fetched | None, _key: str, _caption: str | None, meta: dict[str, Any]) -> None:
        """Called by img2dataset once a URL."""
        try:
            self._write(fetched, meta)
        except OSError as error:
            _end_if_full(error)
            raise

    def _write(self, fetched: Fetched | None, meta: dict[str, Any]) -> None:
        outcome: dict[str, Any] = {"row": meta["row"], "status": "ok", "reason": "", "http": 200}
        if fetched is None:
            outcome |= _failed(meta["error_message"])
        else:
            outcome |= {
                "etag": fetched.etag,
                "last_modified": fetched.last_modified,
                "id": hashlib.sha256(fetched.data).hexdigest(),
                "phash": fetched.inspection.phash,
                "format": fetched.inspection.format,
                "width": fetched.inspection.width,
                "height": fetched.inspection.height,
                "spread": fetched.inspection.spread,
                "offset": self.bytes.tell(),
                "size": len(fetched.data),
            }
            self.bytes.write(fetched.data)
        self.lines.write(json.dumps(outcome) + "\n")
        self.count += 1
        if time.monotonic() - self.reported > 0.2:
            self.report()

    def report(self) -> None:
        """Leaves what is done, and its number, where the parent looks for it; bytes before the lines that name them."""
        self.bytes.flush()
        self.lines.flush()
        self.base.with_suffix(".done").write_text(str(self.count))
        self.reported = time.monotonic()

    def close(self) -> None:
        """Called by img2dataset before it writes its statistics."""
        try:
            self.report()
            self.bytes.close()
            self.lines.close()
        except OSError as error:
            _end_if_full(error)
            raise


def _failed(message: str) -> dict[str, Any]:
    error = message.error if isinstance(message, Failure) else FetchError(message, status=200)
    if error.reason == "unchanged":
        status = "unchanged"
    elif error.reason in OPT_OUT_REASONS:
        status = "opt_out"
    else:
        status = "retry" if error.transient else "failed"
    return {"status": status, "reason": error.reason, "http": error.status, "retry_after": error.retry_after}


class _NoLogger:
    """In the place of img2dataset's logger process, which would only read the statistics and print them."""

    def __init__(self, *_: Any) -> None:
        self.done_shards: set[int] = set()

    def start(self) -> None:
        """Nothing to start."""

    def join(self) -> None:
        """Nothing to wait for."""

    def terminate(self) -> None:
        """Nothing to stop."""


def _die_with_parent() -> None:
    """Ends this process group when the parent is gone, however it went: its end of our stdin closes."""

    def watch() -> None:
        os.read(0, 1)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def main(job_file: str) -> None:
    """Runs the job that `pipelines.crawl.fetch_batch` wrote."""
    _die_with_parent()
    job = CrawlJob.model_validate_json(Path(job_file).read_text(encoding="utf-8"))
    module: Any = importlib.import_module("img2dataset.main")
    module.Downloader = functools.partial(GuardedDownloader, job)
    module.LoggerProcess = _NoLogger
    module.download(
        url_list=job.input,
        input_format="parquet",
        save_additional_columns=["row", "etag", "last_modified"],
        output_folder=job.output,
        processes_count=job.processes,
        thread_count=job.threads,
        number_sample_per_shard=job.shard_rows,
        extract_exif=False,
        compute_hash=None,
        disallowed_header_directives=[],
        retries=0,
        max_shard_retry=0,
    )
