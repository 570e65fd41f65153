"""The object store: local folder and a real S3 server behave alike."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from pathlib import Path

import pytest

from starflow import s3store
from starflow.errors import AlreadyExistsError, ChangedError, ConfigError, NotFoundError, StoreError, UnavailableError
from starflow.objectstore import LocalStore, ObjectStore, open_store
from tests.faulty_s3 import FaultyS3


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "local":
        return open_store(str(tmp_path / "store"))
    s3_url = request.getfixturevalue("s3_url")
    return open_store(s3_url)


def test_what_is_written_is_read(store: ObjectStore) -> None:
    store.write("a/b.bin", b"0123456789")
    assert store.read("a/b.bin") == b"0123456789"
    assert store.read("a/b.bin", start=3, length=4) == b"3456"
    assert store.read("a/b.bin", start=7) == b"789"
    assert store.read("a/b.bin", start=2, length=0) == b""
    store.write("a/b.bin", b"new")
    assert store.read("a/b.bin") == b"new"
    info = store.head("a/b.bin")
    assert info is not None
    assert (info.key, info.size) == ("a/b.bin", 3)
    assert store.head("a/none") is None
    with pytest.raises(NotFoundError, match="a/none"):
        store.read("a/none")


def test_create_has_one_winner(store: ObjectStore) -> None:
    outcomes: list[str] = []

    def race(name: str) -> None:
        try:
            store.create("commit.json", name.encode())
            outcomes.append(name)
        except AlreadyExistsError:
            pass

    threads = [threading.Thread(target=race, args=(f"racer {i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 1
    assert store.read("commit.json") == outcomes[0].encode()
    store.create("commit.json", outcomes[0].encode())  # the same bytes again are harmless


def test_replace_needs_the_current_etag(store: ObjectStore) -> None:
    store.write("lease", b"one")
    first = store.head("lease")
    assert first is not None
    store.replace("lease", b"two", first.etag)
    with pytest.raises(ChangedError, match="lease"):
        store.replace("lease", b"three", first.etag)
    assert store.read("lease") == b"two"
    with pytest.raises(ChangedError):
        store.replace("missing", b"x", first.etag)


def test_list_and_delete(store: ObjectStore) -> None:
    keys = ["p/1", "p/10", "p/2/x", "p.json", "q/1"]
    for key in keys:
        store.write(key, key.encode())
    assert [info.key for info in store.list("p/")] == ["p/1", "p/10", "p/2/x"]
    assert [info.key for info in store.list("p/1")] == ["p/1", "p/10"]
    assert sorted(info.key for info in store.list()) == sorted(keys)
    assert [info.size for info in store.list("q")] == [3]
    store.delete(["p/1", "p/2/x", "never/was"])
    assert sorted(info.key for info in store.list()) == ["p.json", "p/10", "q/1"]
    assert list(store.list("nothing/here")) == []


def test_upload_and_download(store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3store, "MULTIPART_BYTES", 12 * 2**20)
    monkeypatch.setattr(s3store, "STREAM_BYTES", 12 * 2**20)
    data = os.urandom(25 * 2**20)
    source = tmp_path / "source"
    source.write_bytes(data)
    store.upload("big/file", source)
    store.write("big/memory", memoryview(data))
    store.write("small", data[:3_000_001])
    for key, content in (("big/file", data), ("big/memory", data), ("small", data[:3_000_001])):
        target = tmp_path / "target"
        assert store.download(key, target) == hashlib.sha256(content).hexdigest()
        assert target.read_bytes() == content
    with pytest.raises(NotFoundError):
        store.download("big/none", tmp_path / "none")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["source", "target"]


def test_unfinished_local_writes_are_not_listed(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.write("a", b"x")
    (tmp_path / ".b.123~").write_bytes(b"torn")
    assert [info.key for info in store.list()] == ["a"]


def test_a_full_disk_says_so(tmp_path: Path) -> None:
    store = LocalStore(Path("/dev/full"))
    with pytest.raises(StoreError, match="/dev/full"):
        store.write("a", b"x")
    with pytest.raises(StoreError, match="not usable"):
        LocalStore(tmp_path).write("../outside", b"x")


def test_only_an_object_that_is_missing_is_not_found(tmp_path: Path) -> None:
    """Not a target or a source that is: whoever resumes passes over checkpoints whose objects are not found."""
    store = LocalStore(tmp_path / "store")
    store.write("a", b"x")
    with pytest.raises(NotFoundError, match="store/b does not exist"):
        store.download("b", tmp_path / "b")
    for fails in (lambda: store.download("a", tmp_path / "gone" / "a"), lambda: store.upload("c", tmp_path / "gone")):
        with pytest.raises(StoreError, match="gone") as caught:
            fails()
        assert not isinstance(caught.value, NotFoundError)


def test_a_write_survives_a_delete_that_removes_its_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, mkdir, deleted = LocalStore(tmp_path), Path.mkdir, []

    def mkdir_then_delete(path: Path, *args: object, **options: object) -> None:
        mkdir(path, *args, **options)  # type: ignore[arg-type]
        if path == tmp_path / "folder" and not deleted:
            deleted.append(path)
            store.delete(["folder/other"])
            assert not path.exists()

    monkeypatch.setattr(Path, "mkdir", mkdir_then_delete)
    store.write("folder/a", b"x")
    assert deleted
    assert store.read("folder/a") == b"x"


@pytest.mark.parametrize("url", ["http://host/x", "", "s3://"])
def test_unknown_urls_are_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        open_store(url)


def test_unreachable_endpoint_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(s3store, "FIRST_DEADLINE_SECONDS", 0.5)
    with pytest.raises(UnavailableError, match=r"cannot read s3://bucket/k .*127\.0\.0\.1:9"):
        open_store("s3://bucket").read("k")


def test_a_store_without_patience_gives_up_soon(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultyS3(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        quick, patient = open_store(s3_url, patience=0.5), open_store(s3_url)
        patient.write("sign", b"alive")
        monkeypatch.setattr(quick, "_answered", True)  # a store that has answered would be waited for otherwise
        for mode in ("down", "hang"):
            proxy.mode = mode
            began = time.monotonic()
            with pytest.raises(UnavailableError, match="sign after"):
                quick.read("sign")
            assert time.monotonic() - began < 50  # less than without patience: 120 s, and 60 s for one answer
        proxy.mode = ""
        assert patient.read("sign") == b"alive"


def test_wrong_credentials_and_missing_bucket_name_themselves(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFoundError, match="no-such-bucket"):
        open_store("s3://no-such-bucket").read("k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StoreError, match="refuses these credentials"):
        open_store(s3_url).write("k", b"x")


def test_what_dead_writes_left_is_swept(store: ObjectStore) -> None:
    store.write("a/whole", b"x")
    for key in ("a/half", "b/c/half"):
        if isinstance(store, s3store.S3Store):
            name = store.prefix + key
            upload = store.client.create_multipart_upload(Bucket=store.bucket, Key=name)["UploadId"]
            store.client.upload_part(Bucket=store.bucket, Key=name, UploadId=upload, PartNumber=1, Body=b"x" * 2**20)
        else:
            assert isinstance(store, LocalStore)
            path = store.path(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(f".{path.name}.{'0' * 32}~").write_bytes(b"x")
            (store.root / "notes~").write_bytes(b"not ours")
    assert store.sweep(3600) == 0
    assert store.sweep(-3600, dry_run=True) == 2
    assert store.sweep(-3600) == 2
    assert store.sweep(-3600) == 0
    assert store.read("a/whole") == b"x"
    if isinstance(store, LocalStore):
        assert {path.name for path in store.root.rglob("*") if path.is_file()} == {"whole", "notes~"}


def test_a_byte_flipped_on_its_way_down_is_downloaded_again(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_store(s3_url).write("k", b"content" * 1000)
    monkeypatch.setattr(s3store.random, "uniform", lambda low, high: 0.01)
    with FaultyS3(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        store = open_store(s3_url)
        proxy.only, proxy.count = "^GET ", 1
        proxy.mode = "flip"
        assert store.download("k", tmp_path / "file") == hashlib.sha256(b"content" * 1000).hexdigest()
        assert sum(request.startswith("GET ") for request in proxy.requests) == 2
    assert (tmp_path / "file").read_bytes() == b"content" * 1000


def test_a_misspelt_bucket_is_not_made(s3_url: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    store = open_store("s3://misspelt/x")
    assert isinstance(store, s3store.S3Store)
    for write in (
        lambda: store.write("k", b"x"),
        lambda: store.create("k", b"x"),
        lambda: store.upload("k", tmp_path / "file"),
    ):
        with pytest.raises(NotFoundError, match="bucket misspelt does not exist; create it or correct"):
            write()
    assert "misspelt" not in [bucket["Name"] for bucket in store.client.list_buckets()["Buckets"]]
    store.create_bucket()
    store.create_bucket()
    store.write("k", b"x")
    store.client.delete_object(Bucket="misspelt", Key="x/k")
    store.client.delete_bucket(Bucket="misspelt")


def test_a_store_that_does_not_answer_is_said(
    s3_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(s3store, "SILENT_SECONDS", 0.0)
    monkeypatch.setattr(s3store, "FIRST_DEADLINE_SECONDS", 60.0)
    monkeypatch.setattr(s3store.random, "uniform", lambda low, high: 0.01)
    with FaultyS3(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        store = open_store(s3_url)
        proxy.only, proxy.count = "^GET ", 5
        proxy.mode = "503"
        assert list(store.list()) == []
    assert [record.message for record in caplog.records if "does not answer (list" in record.message] != []
    assert len(caplog.records) == 1
