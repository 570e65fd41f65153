"""Image folders and WebDataset tars in the place of a crawl."""

from __future__ import annotations

import io
import json
import os
import tarfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines.datasets import import_batch, read_samples
from pipelines.refresh import RefreshResult, refresh
from pipelines.sources import Columns
from starflow.errors import ConfigError, NotFoundError
from starflow.objectstore import LocalStore, ObjectStore, open_store
from tests.faulty_s3 import FaultyS3
from tests.pipelines.fake_crawl import Bench, png
from tests.pipelines.hostile_web import picture


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def write_folder(folder: Path) -> Path:
    (folder / "sub dir").mkdir(parents=True)
    (folder / "a.png").write_bytes(png(1))
    (folder / "a.txt").write_text(" a first picture\n")
    (folder / "sub dir" / "ü.png").write_bytes(png(2))
    (folder / "sub dir" / "ü.json").write_text(json.dumps({"caption": "a second one", "licence": "CC0"}))
    (folder / "broken.png").write_bytes(png(3)[:100])
    (folder / "broken.txt").write_text("cut off")
    (folder / "notes.md").write_text("nothing")
    return folder


def write_tar(path: Path, seeds: range) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for seed in seeds:
            for suffix, data in (("png", png(seed)), ("txt", f"picture {seed}".encode()), ("cls", b"7")):
                member = tarfile.TarInfo(f"{seed:06d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def test_an_image_folder_becomes_a_snapshot(bench: Bench) -> None:
    folder = write_folder(bench.folder / "pictures")
    result = bench.refresh(folder, source="images", contact="")
    assert (result.added, result.dropped) == (2, {"corrupt": 1})
    assert bench.web.requests.total() == 0
    assert bench.refresh(folder, source="images").added == 0
    (folder / "new.png").write_bytes(png(9))
    (folder / "new.txt").write_text("new")
    assert bench.refresh(folder, source="images").added == 1


def test_webdataset_tars_become_a_snapshot(bench: Bench) -> None:
    write_tar(bench.folder / "tars" / "000.tar", range(3))
    write_tar(bench.folder / "tars" / "001.tar", range(2, 5))
    result = bench.refresh(bench.folder / "tars", source="webdataset")
    assert (result.added, result.dropped) == (5, {"duplicate": 1})


def refresh_from(bench: Bench, location: str, **settings: Any) -> RefreshResult:
    return refresh(bench.config(Path("-"), **settings).model_copy(update={"urls": location, "contact": ""}))


def put_folder(store: ObjectStore, prefix: str, folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            store.upload(f"{prefix}/{path.relative_to(folder)}", path)


def test_image_folders_on_s3(bench: Bench, s3_url: str) -> None:
    write_folder(bench.folder / "pictures")
    store = open_store(s3_url)
    put_folder(store, "sets/pictures", bench.folder / "pictures")
    store.write("sets/pictures-of-others/z.png", png(40))  # starts alike
    bench.store = f"{s3_url}/store"
    for location in (f"{s3_url}/sets/pictures", f"{s3_url}/sets/pictures/"):
        (rows,) = read_samples(location, "images", Columns())
        assert rows["caption"].to_pylist() == ["a first picture", "cut off", "a second one"]
    result = refresh_from(bench, f"{s3_url}/sets/pictures", source="images")
    assert (result.added, result.dropped) == (2, {"corrupt": 1})
    store.write("sets/pictures/a.png", png(50))
    store.delete(["sets/pictures/sub dir/ü.png"])
    bench.now += timedelta(days=2)
    result = refresh_from(bench, f"{s3_url}/sets/pictures", source="images", revalidate_days=1)
    assert (result.added, result.removed, result.total) == (1, {"changed": 1}, 2)  # what is not listed is not asked for


def test_webdataset_tars_on_s3(bench: Bench, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(s3_url)
    for number, seeds in enumerate((range(30), range(29, 40))):
        write_tar(bench.folder / f"{number:03d}.tar", seeds)
        store.upload(f"tars/{number:03d}.tar", bench.folder / f"{number:03d}.tar")
    bench.store = f"{s3_url}/store"
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    with FaultyS3(endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        rows = pa.concat_tables(read_samples(f"{s3_url}/tars", "webdataset", Columns()))
        assert rows["caption"].to_pylist() == [f"picture {seed}" for seed in (*range(30), *range(29, 40))]
        assert len(proxy.requests) < 10  # not one for each member
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    result = refresh_from(bench, f"{s3_url}/tars", source="webdataset")
    assert (result.added, result.dropped) == (40, {"duplicate": 1})
    assert refresh_from(bench, f"{s3_url}/tars/000.tar", source="webdataset").added == 0


def test_captions_come_from_text_or_json(tmp_path: Path) -> None:
    (rows,) = read_samples(str(write_folder(tmp_path / "p")), "images", Columns())
    found = {Path(row["url"]).name: (row["caption"], row["licence"]) for row in rows.to_pylist()}
    assert found == {
        "a.png": ("a first picture", None),
        "%C3%BC.png": ("a second one", "CC0"),
        "broken.png": ("cut off", None),
    }


def test_a_picture_in_a_tar_is_named_by_its_place(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", range(1))
    (rows,) = read_samples(str(tmp_path / "x.tar"), "webdataset", Columns())
    assert rows["url"].to_pylist() == [f"file://{tmp_path}/x.tar?offset=512&size={len(png(0))}#000000.png"]


def test_pictures_that_are_too_large_or_none_are_counted_and_not_read(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    read_object = LocalStore.read
    monkeypatch.setattr(LocalStore, "read", lambda self, *args: (read.append(args[0]), read_object(self, *args))[1])
    folder = bench.folder / "pictures"
    folder.mkdir()
    (folder / "good.png").write_bytes(png(1))
    (folder / "good.txt").write_text("good")
    (folder / "large.png").write_bytes(bytes(20_000))
    (folder / "empty.png").write_bytes(b"")
    avif = picture("AVIF")
    pixels_at = avif.index(b"mdat") + 4
    (folder / "broken.avif").write_bytes(avif[:pixels_at] + bytes(len(avif) - pixels_at))
    result = bench.refresh(folder, source="images", max_bytes=10_000)
    assert (result.added, result.dropped) == (1, {"corrupt": 1, "empty": 1, "too_large": 1})
    assert not [key for key in read if key.endswith("large.png")]
    member = pa.table({"url": ["file:///nowhere.tar?offset=512&size=20000"]})
    table = import_batch(member, bench.config(folder, max_bytes=10_000).policy(), bench.folder / "batch")
    assert table["reason"].to_pylist() == ["too_large"]


def test_whatever_json_says_becomes_text(tmp_path: Path) -> None:
    records = [
        {"caption": 7, "licence": 4.0},
        {"caption": "cut \ud83d", "licence": {"name": "CC0"}},
        {"caption": ["x"]},
    ]
    for number, record in enumerate(records):
        (tmp_path / f"{number}.png").write_bytes(png(number))
        (tmp_path / f"{number}.json").write_text(json.dumps(record))
    (rows,) = read_samples(str(tmp_path), "images", Columns())
    assert rows["caption"].to_pylist() == ["7", "cut ?", '["x"]']
    assert rows["licence"].to_pylist() == ["4.0", '{"name": "CC0"}', None]


def test_nothing_there_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no images under"):
        list(read_samples(str(tmp_path), "images", Columns()))
    (tmp_path / "x.tar").write_bytes(b"x" * 2000)
    with pytest.raises(ConfigError, match=r"x\.tar cannot be read as a tar"):
        list(read_samples(str(tmp_path), "webdataset", Columns()))
