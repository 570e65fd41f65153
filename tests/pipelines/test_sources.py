"""URL lists of every format, streamed."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.sources import Columns, list_files, read_rows
from starflow.errors import ConfigError, NotFoundError
from starflow.objectstore import open_store

ROWS = [("http://a.example/1.png", "one, with a comma"), ("http://a.example/2.png", "zwei ü")]
TABLE = pa.table({"url": [url for url, _ in ROWS], "caption": [text for _, text in ROWS], "licence": ["CC0", None]})


def write(folder: Path, kind: str) -> Path:
    path = folder / f"list.{kind}"
    if kind == "parquet":
        pq.write_table(TABLE, path)
        return path
    if kind.startswith("csv"):
        text = "url,caption,licence\n" + "".join(f'{url},"{caption}",\n' for url, caption in ROWS)
    elif kind.startswith("tsv"):
        text = "url\tcaption\n" + "".join(f"{url}\t{caption}\n" for url, caption in ROWS)
    elif kind.startswith("jsonl"):
        text = "".join(f'{{"url": "{url}", "caption": "{caption}", "n": 1}}\n\n' for url, caption in ROWS)
    else:
        text = "# comment\n" + "\n\n".join(url for url, _ in ROWS)
    path.write_bytes(gzip.compress(text.encode()) if kind.endswith("gz") else text.encode())
    return path


def read(path: Path | str, columns: Columns | None = None) -> pa.Table:
    return pa.concat_tables(read_rows(str(path), columns or Columns(), Path(path).parent))


@pytest.mark.parametrize("kind", ["parquet", "csv", "tsv", "jsonl", "csv.gz", "jsonl.gz"])
def test_every_format(tmp_path: Path, kind: str) -> None:
    rows = read(write(tmp_path, kind))
    assert list(zip(rows["url"].to_pylist(), rows["caption"].to_pylist(), strict=True)) == ROWS


@pytest.mark.parametrize("kind", ["txt", "txt.gz"])
def test_text_lists_have_no_captions(tmp_path: Path, kind: str) -> None:
    rows = read(write(tmp_path, kind))
    assert rows["url"].to_pylist() == [url for url, _ in ROWS]
    assert rows["caption"].to_pylist() == ["", ""]


def test_columns_are_mapped_and_extra_ones_kept(tmp_path: Path) -> None:
    path = tmp_path / "l.csv"
    path.write_text("link,alt,lang,rights\nhttp://a.example/1.png,x,de,CC0\n")
    columns = Columns(url="link", caption="alt", licence="rights", extra=("lang",))
    assert read(path, columns).to_pylist() == [
        {"url": "http://a.example/1.png", "caption": "x", "licence": "CC0", "extra": '{"lang": "de"}'}
    ]


def test_nulls_and_numbers_become_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["http://a.example", None], "caption": [1, None]}), tmp_path / "l.parquet")
    rows = read(tmp_path / "l.parquet")
    assert rows["url"].to_pylist() == ["http://a.example", ""]
    assert rows["caption"].to_pylist() == ["1", ""]


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_a_missing_column_names_those_there_are(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ConfigError, match=r"no column 'link', it has url.*url_column"):
        read(write(tmp_path, kind), Columns(url="link"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("l.parquet", b"no parquet"),
        ("l.csv", b"url,caption\n\xff\xfe,x\n"),
        ("l.csv", b'url,caption\n"never closed,x\n'),
        ("l.jsonl", b"{not json}\n"),
        ("l.jsonl", b"[1]\n"),
        ("l.txt.gz", b"no gzip"),
        ("l.txt.gz", gzip.compress(b"http://a.example\n" * 1000)[:-9]),
    ],
)
def test_unreadable_lists_are_one_sentence(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name} cannot be read"):
        read(tmp_path / name)


def test_damaged_pages_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "l.parquet"
    pq.write_table(pa.table({"url": ["http://a.example"] * 1000, "caption": ["x"] * 1000}), path)
    damaged = bytearray(path.read_bytes())
    damaged[4:60] = b"\xff" * 56  # the footer is whole, the first page's header is not
    path.write_bytes(damaged)
    with pytest.raises(ConfigError, match=r"l\.parquet cannot be read as parquet: .*is the file complete"):
        read(path)


def test_damaged_gzip_is_one_sentence(tmp_path: Path) -> None:
    damaged = bytearray(gzip.compress("".join(f"http://a.example/{i}\n" for i in range(1000)).encode()))
    damaged[10:40] = b"\xff" * 30
    (tmp_path / "l.csv.gz").write_bytes(damaged)
    with pytest.raises(ConfigError, match=r"l\.csv\.gz cannot be read as csv: .*is the file complete"):
        read(tmp_path / "l.csv.gz")


def test_a_row_longer_than_its_header_is_named(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("url,caption\nhttp://a.example,x\nhttp://b.example,not quoted, y\n")
    with pytest.raises(ConfigError, match=r"l\.csv has more fields in line 3 than in its header; quote"):
        read(tmp_path / "l.csv")


def test_json_lines_may_lack_what_others_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.sources._BATCH_ROWS", 2)
    records = [{"url": "a"}, {"url": "b", "caption": "x"}, {"url": "c"}, {"url": "d", "licence": "CC0"}]
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = read(tmp_path / "l.jsonl")
    assert rows["caption"].to_pylist() == ["", "x", "", ""]
    assert rows["licence"].to_pylist() == [None, None, None, "CC0"]


def test_files_folders_and_globs(tmp_path: Path) -> None:
    for name in ("b.csv", "a.parquet", "sub/c.jsonl.gz", "notes.md", ".hidden.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    inside = [str(tmp_path / name) for name in ("a.parquet", "b.csv", "sub/c.jsonl.gz")]
    assert list_files(str(tmp_path)) == inside
    assert list_files(str(tmp_path / "*.csv")) == [inside[1]]
    assert list_files(str(tmp_path / "**/*.gz")) == [inside[2]]
    assert list_files(inside[0]) == [inside[0]]


def test_nothing_there_and_no_known_format(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no URL list"):
        list_files(str(tmp_path / "nothing.parquet"))
    (tmp_path / "list.xlsx").touch()
    with pytest.raises(ConfigError, match="no known format"):
        list_files(str(tmp_path / "list.xlsx"))


def test_large_lists_come_in_pieces(tmp_path: Path) -> None:
    count = 100_000
    pq.write_table(pa.table({"url": [f"http://a.example/{i}" for i in range(count)]}), tmp_path / "l.parquet")
    pieces = list(read_rows(str(tmp_path / "l.parquet"), Columns(caption=None), tmp_path))
    assert sum(map(len, pieces)) == count
    assert max(map(len, pieces)) < count / 2


def test_lists_on_s3(tmp_path: Path, s3_url: str) -> None:
    store = open_store(s3_url)
    for kind in ("parquet", "csv", "jsonl.gz"):
        store.upload(f"lists/2026/list.{kind}", write(tmp_path, kind))
    store.write("lists/2026/notes.md", b"no list")
    store.write("lists/2026/_SUCCESS.csv", b"")
    store.upload("lists/2026-old/list.csv", tmp_path / "list.csv")
    work = tmp_path / "work"
    work.mkdir()
    files = [f"{s3_url}/lists/2026/list.{kind}" for kind in ("csv", "jsonl.gz", "parquet")]
    for location in ("lists/2026", "lists/2026/", "lists/2026/list.*", "lists/20?6/*"):
        found = [file for file in list_files(f"{s3_url}/{location}") if not file.endswith((".md", "_SUCCESS.csv"))]
        assert found == files, location
    assert list_files(f"{s3_url}/lists/2026") == files
    assert list_files(f"{s3_url}/lists/2026/list.csv") == files[:1]
    for file in files:
        (rows,) = read_rows(file, Columns(), work)
        assert list(zip(rows["url"].to_pylist(), rows["caption"].to_pylist(), strict=True)) == ROWS
        assert not list(work.iterdir())
    with pytest.raises(NotFoundError, match="no URL list at"):
        list_files(f"{s3_url}/lists/2025")
    with pytest.raises(ConfigError, match="no known format"):
        list_files(f"{s3_url}/lists/2026/notes.md")
    store.write("lists/cut.parquet", store.read("lists/2026/list.parquet")[:-20])
    with pytest.raises(ConfigError, match=r"cut\.parquet cannot be read as parquet"):
        list(read_rows(f"{s3_url}/lists/cut.parquet", Columns(), work))


def test_a_column_that_is_no_text_is_refused_at_once(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": [1, 2], "caption": ["a", "b"]}), tmp_path / "list.parquet")
    with pytest.raises(ConfigError, match="column 'url' of int64, not of text; set url_column"):
        read(tmp_path / "list.parquet")


@pytest.mark.parametrize("name", ["pictures", "w-000.tar"])
def test_other_sources_are_named_where_there_is_no_list(tmp_path: Path, name: str) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "w-000.tar").touch()
    with pytest.raises((NotFoundError, ConfigError), match=r"set source=images .*, (or )?source=webdataset"):
        list_files(str(tmp_path / name))
