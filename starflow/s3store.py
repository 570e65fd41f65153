"""Objects in an S3 bucket, through boto3, with bounded retries and errors that name key, attempts and remedy."""

from __future__ import annotations

import base64
import hashlib
import io
import logging
import os
import random
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from starflow.errors import AlreadyExistsError, ChangedError, ConfigError, NotFoundError, StoreError, UnavailableError
from starflow.objectstore import ObjectInfo, ObjectStore, file_sha256

#: Objects above this size go up in parts, each with its own checksum.
MULTIPART_BYTES = 64 * 2**20
#: Up to this size an object, such as a latent shard, comes down in one request, read in blocks; larger ones in parts.
STREAM_BYTES, BLOCK_BYTES = 256 * 2**20, 2**18
#: How long an S3 operation is retried before it fails for good, in seconds: short until the store has
#: answered once, because then the endpoint is more likely wrong than briefly down.
FIRST_DEADLINE_SECONDS, DEADLINE_SECONDS = 10.0, 120.0
#: Retries that take longer than this are told of.
SILENT_SECONDS = 5.0
#: What a server says when bytes changed on their way to it.
DAMAGED_CODES = frozenset(("BadDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch"))

T = TypeVar("T")


class S3Store(ObjectStore):
    """Keys under ``s3://bucket/prefix``; safe to use from several threads and after a fork."""

    def __init__(self, bucket: str, prefix: str, patience: float | None = None) -> None:
        self.bucket, self.prefix, self.patience = bucket, f"{prefix}/" if prefix else "", patience
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._clients_of: tuple[int, _Clients] | None = None
        self._answered = self._has_bucket = False

    @property
    def client(self) -> Any:
        """The boto3 client."""
        return self._clients.plain

    @property
    def _clients(self) -> _Clients:
        # boto3 clients do not survive a fork, so each process makes its own.
        if self._clients_of is None or self._clients_of[0] != os.getpid():
            self._clients_of = (os.getpid(), _s3_clients(self.patience))
        return self._clients_of[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_clients_of": None}

    def read(self, key: str, start: int | None = None, length: int | None = None) -> bytes:
        span = {}
        if length == 0:
            return b""
        if start is not None or length is not None:
            first = start or 0
            span = {"Range": f"bytes={first}-{'' if length is None else first + length - 1}"}

        def get() -> bytes:
            body = self.client.get_object(Bucket=self.bucket, Key=self.prefix + key, **span)["Body"]
            return bytes(body.read())

        return self._retry("read", key, get)

    def write(self, key: str, data: bytes | memoryview) -> None:
        if len(data) > MULTIPART_BYTES:
            self._require_bucket("write", key)
            self._retry("write", key, lambda: self._transfer_up(key, _MemoryFile(data)), len(data))
        else:
            self._put(key, data)

    def create(self, key: str, data: bytes) -> None:
        try:
            self._put(key, data, IfNoneMatch="*")
        except _PreconditionError:
            # A put whose answer was lost is retried by boto3 and then finds its own object.
            if self.read(key) != data:
                raise AlreadyExistsError(
                    f"{self.url}/{key} exists with other content: another writer committed first"
                ) from None

    def replace(self, key: str, data: bytes, etag: str) -> None:
        try:
            self._put(key, data, IfMatch=etag)
        except (_PreconditionError, NotFoundError):
            info = self.head(key)
            if info is None or self.read(key) != data:
                raise ChangedError(f"{self.url}/{key} has been changed by another writer since it was read") from None

    def head(self, key: str) -> ObjectInfo | None:
        try:
            answer = self._retry(
                "look up", key, lambda: self.client.head_object(Bucket=self.bucket, Key=self.prefix + key)
            )
        except NotFoundError:
            return None
        return ObjectInfo(key, answer["ContentLength"], answer["ETag"])

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        token: dict[str, str] = {}
        while True:
            arguments = {"Bucket": self.bucket, "Prefix": self.prefix + prefix, **token}
            page = self._retry("list", prefix, partial(self.client.list_objects_v2, **arguments))
            for item in page.get("Contents", ()):
                yield ObjectInfo(item["Key"].removeprefix(self.prefix), item["Size"], item["ETag"])
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, keys: Iterable[str]) -> None:
        names = [self.prefix + key for key in keys]
        for first in range(0, len(names), 1000):  # S3's limit for one request
            batch = {"Objects": [{"Key": name} for name in names[first : first + 1000]], "Quiet": True}
            answer = self._retry(
                "delete",
                names[first],
                partial(self.client.delete_objects, Bucket=self.bucket, Delete=batch),
            )
            if failed := answer.get("Errors"):
                first_failure = failed[0]
                raise StoreError(
                    f"cannot delete {len(failed)} objects of {self.url}, first {first_failure.get('Key')}: "
                    f"{first_failure.get('Message')}; check the permission s3:DeleteObject"
                )

    def sweep(self, seconds: float, dry_run: bool = False) -> int:
        limit, found, marker = datetime.now(UTC) - timedelta(seconds=seconds), 0, dict[str, str]()
        while True:
            arguments = {"Bucket": self.bucket, "Prefix": self.prefix, **marker}
            page = self._retry("list uploads", "", partial(self.client.list_multipart_uploads, **arguments))
            for upload in page.get("Uploads", ()):
                if upload["Initiated"] <= limit:
                    found += 1
                    if not dry_run:
                        self._abort(upload["Key"], upload["UploadId"])
            if not page.get("IsTruncated"):
                return found
            marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def _abort(self, name: str, upload: str) -> None:
        call = partial(self.client.abort_multipart_upload, Bucket=self.bucket, Key=name, UploadId=upload)
        with suppress(NotFoundError):  # just finished
            self._retry("abort the upload of", name.removeprefix(self.prefix), call)

    def upload(self, key: str, path: Path) -> None:
        self._require_bucket("upload", key)

        def transfer() -> None:
            with path.open("rb") as file:
                self._transfer_up(key, file)

        self._retry("upload", key, transfer, path.stat().st_size)

    def download(self, key: str, path: Path) -> str:
        unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}~")
        try:
            digest = self._retry("download", key, lambda: self._transfer_down(key, unfinished))
            unfinished.replace(path)
            return digest
        finally:
            unfinished.unlink(missing_ok=True)

    def _require_bucket(self, operation: str, key: str) -> None:
        """Before the first write: raises NotFoundError for a bucket that is not there.

        Some servers would make one of a misspelt name.
        """
        if self._has_bucket:
            return
        try:
            self._retry(operation, key, lambda: self.client.head_bucket(Bucket=self.bucket))
        except UnavailableError:
            raise
        except NotFoundError as error:
            raise NotFoundError(f"bucket {self.bucket} does not exist; create it or correct the store URL") from error
        except StoreError:
            pass  # who may write need not be allowed to ask
        self._has_bucket = True

    def create_bucket(self) -> None:
        """Makes the bucket, unless it is there: for a server of one's own."""
        try:
            self._require_bucket("write", "")
        except NotFoundError:
            self._retry("make the bucket of", "", lambda: self.client.create_bucket(Bucket=self.bucket))

    def _put(self, key: str, data: bytes | memoryview, **conditions: str) -> None:
        body = bytes(data)
        self._require_bucket("write", key)
        self._retry(
            "write",
            key,
            lambda: self.client.put_object(
                Bucket=self.bucket, Key=self.prefix + key, Body=body, ChecksumAlgorithm="SHA256", **conditions
            ),
            len(body),
        )

    def _transfer_up(self, key: str, file: Any) -> None:
        self.client.upload_fileobj(
            file,
            self.bucket,
            self.prefix + key,
            ExtraArgs={"ChecksumAlgorithm": "SHA256"},
            Config=_transfer_config(),
        )

    def _transfer_down(self, key: str, path: Path) -> str:
        """A shard in one request, hashed as it comes; several shards come at once, and a larger object in parts."""
        answer = self._clients.downloads.get_object(Bucket=self.bucket, Key=self.prefix + key)
        with closing(answer["Body"]) as body:
            if answer["ContentLength"] <= STREAM_BYTES:
                digest = hashlib.sha256()
                with path.open("wb") as file:
                    for block in body.iter_chunks(BLOCK_BYTES):
                        digest.update(block)
                        file.write(block)
                _check_digest(answer, digest.digest())
                return digest.hexdigest()
        self.client.download_file(self.bucket, self.prefix + key, str(path), Config=_transfer_config())
        return file_sha256(path)

    def _retry(self, operation: str, key: str, call: Callable[[], T], size: int | None = None) -> T:
        """Runs `call` until it succeeds, fails for good, or the deadline passes.

        boto3 retries a few times within seconds; this outer, jittered loop outlives longer outages.
        """
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            NoCredentialsError,
            PartialCredentialsError,
        )

        started, attempt, said = time.monotonic(), 0, False
        while True:
            attempt += 1
            try:
                result = call()
                self._answered = True
                return result
            except (NoCredentialsError, PartialCredentialsError) as error:
                raise StoreError(
                    f"no credentials for {self.url}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
                ) from error
            except (ClientError, BotoCoreError, Boto3Error) as error:
                self._raise_if_final(key, error)
                elapsed = time.monotonic() - started
                deadline = self.patience or (DEADLINE_SECONDS if self._answered else FIRST_DEADLINE_SECONDS)
                if elapsed > deadline:
                    amount = "" if size is None else f" ({size} bytes)"
                    raise UnavailableError(
                        f"cannot {operation} {self.url}/{key}{amount} after {attempt} attempts in {elapsed:.0f} s: "
                        f"{error}; check that the endpoint {self.client.meta.endpoint_url} is up"
                    ) from error
                if elapsed > SILENT_SECONDS and not said:
                    said = True
                    logging.getLogger(__name__).warning(
                        "%s does not answer (%s %s: %s); trying again for %.0f s", self.url, operation, key, error,
                        deadline - elapsed,
                    )  # fmt: skip
                time.sleep(min(0.5 * 2**attempt, self.patience or 10.0, 10.0) * random.uniform(0.5, 1.0))

    def _raise_if_final(self, key: str, error: Exception) -> None:
        """Translates the answers that no retry will change."""
        cause = error if hasattr(error, "response") else error.__cause__ or error.__context__
        response = getattr(cause, "response", None) or {}
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        code = str(response.get("Error", {}).get("Code", ""))
        message = str(error)
        if status == 412 or code == "PreconditionFailed" or "PreconditionFailed" in message:
            raise _PreconditionError(message) from error
        if code == "NoSuchBucket" or (status == 404 and "NoSuchBucket" in message):
            raise NotFoundError(f"bucket {self.bucket} does not exist; create it or correct the store URL") from error
        if status == 404:
            raise NotFoundError(f"{self.url}/{key} does not exist; check the store and the name") from error
        if status in (401, 403):
            raise StoreError(
                f"{self.url} refuses these credentials for {key} ({code or status}); "
                "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy"
            ) from error
        if status == 507:
            raise StoreError(f"{self.url} is full, it did not take {key} ({code}); make room there") from error
        if code in DAMAGED_CODES:
            return  # the bytes that we have are right
        if status is not None and 400 <= status < 500 and status not in (408, 409, 425, 429):
            raise StoreError(f"{self.url}/{key}: {message}") from error


class _PreconditionError(StoreError):
    """The condition of a conditional put did not hold."""


class _MemoryFile(io.RawIOBase):
    """A read-only file over a buffer, without copying it as BytesIO would."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data, self._position = memoryview(data).cast("B"), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._data)}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        block = self._data[self._position : self._position + len(buffer)]
        buffer[: len(block)] = block
        self._position += len(block)
        return len(block)


@dataclass(frozen=True)
class _Clients:
    """Two of one session; `downloads` leaves it to us to compare what comes with the server's SHA-256.

    boto3 would hash it, too: half of the CPU time of a download, which already has the digest that we need.
    """

    plain: Any
    downloads: Any


def _s3_clients(patience: float | None) -> _Clients:
    import boto3
    from botocore.config import Config as BotoConfig
    from botocore.exceptions import BotoCoreError

    settings = BotoConfig(
        retries={"mode": "standard", "total_max_attempts": 4 if patience is None else 1},
        connect_timeout=min(5, patience or 5),
        read_timeout=patience or 60,
        max_pool_connections=16,
    )
    unchecked = settings.merge(BotoConfig(response_checksum_validation="when_required"))
    try:
        session = boto3.session.Session()
        clients = _Clients(session.client("s3", config=settings), session.client("s3", config=unchecked))
    except (BotoCoreError, ValueError) as error:
        raise ConfigError(f"cannot set up S3: {error}; check AWS_ENDPOINT_URL and AWS_REGION") from error
    clients.downloads.meta.events.register("before-call.s3.GetObject", _ask_for_checksum)
    return clients


def _ask_for_checksum(params: dict[str, Any], **_: Any) -> None:
    params["headers"]["x-amz-checksum-mode"] = "ENABLED"


def _check_digest(answer: Mapping[str, Any], digest: bytes) -> None:
    """Raises botocore's error for damaged bytes, which is retried, where the server knows their SHA-256 as a whole."""
    from botocore.exceptions import FlexibleChecksumError

    expected = answer.get("ChecksumSHA256", "-")  # of parts: <hash of their hashes>-<how many>
    if "-" not in expected and base64.b64decode(expected) != digest:
        raise FlexibleChecksumError(error_msg=f"expected the SHA-256 {expected}, got {digest.hex()}")


def _transfer_config() -> Any:
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(multipart_threshold=MULTIPART_BYTES, multipart_chunksize=MULTIPART_BYTES // 2)
