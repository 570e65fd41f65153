"""One batch on its way through a refresh: fetched, captioned, filtered; each step is committed by a manifest."""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from pipelines.captioners import AltText
from pipelines.config import CAPTION_SETTINGS, RefreshConfig
from pipelines.crawl import OUTCOME, UNASKED, fetch_batch
from pipelines.datasets import import_batch
from pipelines.filters import load_score
from pipelines.guard import FetchPolicy
from pipelines.ledger import get_table, put_table
from pipelines.originals import Picture
from pipelines.packing import pack
from pipelines.plan import ROWS, Batch
from pipelines.revalidation import left_rows
from pipelines.texts import caption_quality, repeats
from starflow import manifest
from starflow.config import Config
from starflow.errors import AlreadyExistsError, NotFoundError
from starflow.images import ImageError, decode_image
from starflow.manifest import ObjectRef
from starflow.objectstore import ObjectStore

if TYPE_CHECKING:
    from pipelines.captioning import Captioning

VERSION = 1
#: URLs kept as examples of each reason, for reports.
EXAMPLES = 5
_PICTURES = 64

CAPTIONS = pa.list_(
    pa.struct([("text", pa.string()), ("origin", pa.string()), ("version", pa.string()), ("weight", pa.float32())])
)
IMAGE = pa.struct([("key", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])
#: The table of kept samples, which encoding reads; `image` points at original bytes in an uncompressed tar.
SAMPLES = pa.schema(
    [
        ("id", pa.string()),
        ("url", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("phash", pa.int64()),
        ("licence", pa.string()),
        ("extra", pa.string()),
        ("captions", CAPTIONS),
        ("image", IMAGE),
    ]
)


class CrawlRecord(Config):
    """What fetching a batch gave: the tar of original bytes, the table with one row a URL, what has left, and when."""

    images: ObjectRef | None
    fetched: ObjectRef
    left: ObjectRef | None = None
    fetched_at: datetime | None = None
    statuses: dict[str, int]
    reasons: dict[str, int]
    examples: dict[str, list[str]]


class CaptionRecord(Config):
    """Captions of the batch's pictures: key, captions; and a hash of the settings that decided them."""

    captions: ObjectRef
    captioner: str
    quality: dict[str, int]
    settings: str = ""


class FilterRecord(Config):
    """The samples that were kept, key and reason of those that were not, the takedowns that held, and a hash of the
    settings and captions that decided."""

    samples: ObjectRef
    dropped: ObjectRef
    takedowns: ObjectRef | None
    settings: str = ""
    count: int
    reasons: dict[str, int]
    examples: dict[str, list[str]]


def utc_now() -> datetime:
    """The time, to the second."""
    return datetime.now(UTC).replace(microsecond=0)


def load_record(store: ObjectStore, batch: Batch, record: type[Any]) -> Any:
    """The batch's committed record of that type, or None."""
    try:
        body = manifest.load(store, _key(batch, record), record.__name__, VERSION)
    except NotFoundError:
        return None
    return record.model_validate(body)


def commit_record(store: ObjectStore, batch: Batch, record: Config) -> Any:
    """Commits the record and returns it; or, when another process was first, the one that it committed."""
    try:
        manifest.commit(
            store, _key(batch, type(record)), type(record).__name__, VERSION, record.model_dump(mode="json")
        )
    except AlreadyExistsError:
        return load_record(store, batch, type(record))
    return record


def _replace_record(store: ObjectStore, batch: Batch, record: Config) -> Any:
    """Commits the record in the place of any other one of its type."""
    old = load_record(store, batch, type(record))
    if old is not None and old != record:
        store.delete([_key(batch, type(record))])
    return commit_record(store, batch, record)


def _key(batch: Batch, record: type[Any]) -> str:
    return f"{batch.folder}{record.__name__.removesuffix('Record').lower()}.json"


def crawl_batch(
    store: ObjectStore,
    batch: Batch,
    config: RefreshConfig,
    policy: FetchPolicy,
    blocked: Callable[[str, str | None], str],
    work: Path,
    on_progress: Callable[[int], None],
) -> CrawlRecord:
    """Fetches a batch and commits original bytes and table.

    `blocked` gives the reason not to ask for a URL, with the id that it gave last time, or "".
    """
    rows = get_table(store, batch.rows)
    known = zip(rows["url"].to_pylist(), rows["known_id"].to_pylist(), strict=True)
    reasons = np.array([blocked(url, id) for url, id in known], dtype=object)
    asked = np.flatnonzero(reasons == "")
    folder, rules = work / "batch", work / "rules"
    rules.mkdir(exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    outcomes = _refused(np.flatnonzero(reasons != ""), reasons)
    if len(asked):
        urls = rows.take(asked)
        if config.source == "list":
            fetched = fetch_batch(urls, policy, config.processes, config.threads, folder, rules, on_progress)
        else:
            fetched = import_batch(urls, policy, folder, on_progress)
        numbers = pa.array(asked).take(fetched["row"])
        outcomes = pa.concat_tables([outcomes, fetched.set_column(0, "row", numbers)])
    table, tar = pack(rows, outcomes.sort_by("row"), folder)
    images = _upload(store, batch, tar) if tar is not None else None
    shutil.rmtree(folder, ignore_errors=True)
    left = left_rows(table)
    failed = table.filter(pc.invert(pc.is_in(table["status"], pa.array(["ok", "unchanged"]))))
    record = CrawlRecord(
        images=images,
        fetched=put_table(store, f"{batch.folder}fetched", table),
        left=put_table(store, f"{batch.folder}left", left) if len(left) else None,
        fetched_at=utc_now(),
        statuses=dict(Counter(table["status"].to_pylist())),
        reasons=dict(Counter(failed["reason"].to_pylist())),
        examples=examples(failed["reason"].to_pylist(), failed["url"].to_pylist()),
    )
    return commit_record(store, batch, record)  # type: ignore[no-any-return]


def examples(reasons: list[str], urls: list[str]) -> dict[str, list[str]]:
    """A few URLs of each reason."""
    found: dict[str, list[str]] = {}
    for reason, url in zip(reasons, urls, strict=True):
        if reason and len(found.setdefault(reason, [])) < EXAMPLES:
            found[reason].append(url)
    return found


def _refused(rows: np.ndarray, reasons: np.ndarray) -> pa.Table:
    records = [{"row": int(row), "status": "blocked", "reason": reasons[row], "http": 0} for row in rows]
    return pa.Table.from_pylist(records, OUTCOME)


def _upload(store: ObjectStore, batch: Batch, tar: Path) -> ObjectRef:
    with tar.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return manifest.upload(store, f"{batch.folder}images-{digest[:16]}.tar", tar)


def caption_batch(
    store: ObjectStore, batch: Batch, crawl: CrawlRecord, captioner: AltText | Captioning, config: RefreshConfig
) -> CaptionRecord:
    """Captions the batch's pictures: with the list's own text, and with `captioner` if it is another one.

    Commits the record in the place of one of other settings.
    """
    table = get_table(store, crawl.fetched)
    table = table.filter(pc.equal(table["status"], "ok"))
    alts = AltText().caption([], table["caption"].to_pylist())
    layers, figures = [(AltText.name, AltText.version, alts)], dict[str, int]()
    if not isinstance(captioner, AltText) and crawl.images is not None:
        prefix = f"{batch.folder}captions/{config.digest(CAPTION_SETTINGS)}/"
        texts, refused = _model_captions(prefix, crawl.images, table, alts, captioner)
        stand_in = sum(bool(alt) and not text for alt, text in zip(alts, texts, strict=True))
        figures = {"stand_in": stand_in, "repeated": repeats(texts), **refused}  # nothing counts twice
        layers.append((captioner.name, captioner.version, texts))
    captions = [
        [
            {"text": texts[row], "origin": origin, "version": version, "weight": 1.0}
            for origin, version, texts in layers
            if texts[row]
        ]
        for row in range(len(table))
    ]
    result = pa.table({"key": table["key"], "captions": pa.array(captions, CAPTIONS)})
    ref = put_table(store, f"{batch.folder}captions", result)
    record = CaptionRecord(
        captions=ref,
        captioner=f"{captioner.name} {captioner.version}",
        quality=caption_quality([str(each[-1]["text"]) if each else "" for each in captions]) | figures,
        settings=config.digest(CAPTION_SETTINGS),
    )
    committed: CaptionRecord = _replace_record(store, batch, record)
    store.delete([info.key for info in store.list(f"{batch.folder}captions/")])
    return committed


def _model_captions(
    prefix: str, images: ObjectRef, table: pa.Table, alts: list[str], captioner: Captioning
) -> tuple[list[str], dict[str, int]]:
    places = zip(table["offset"].to_pylist(), table["size"].to_pylist(), strict=True)
    pictures = [Picture(row, images.key, offset, size) for row, (offset, size) in enumerate(places)]
    return captioner.captions(prefix, pictures, alts)


def _pictures(
    store: ObjectStore, images: ObjectRef, table: pa.Table, work: Path
) -> Iterator[tuple[list[int], list[Image.Image]]]:
    """(row numbers, decoded pictures) of the table, a few at a time; what cannot be decoded is left out."""
    tar = work / "pictures.tar"
    manifest.download(store, images, tar)
    places = list(zip(table["offset"].to_pylist(), table["size"].to_pylist(), strict=True))
    with tar.open("rb") as file:
        for first in range(0, len(places), _PICTURES):
            rows, pictures = [], []
            for row in range(first, min(first + _PICTURES, len(places))):
                file.seek(places[row][0])
                with suppress(ImageError):  # counted when it is encoded
                    pictures.append(decode_image(file.read(places[row][1])))
                    rows.append(row)
            yield rows, pictures
    tar.unlink()


def apply_score(
    store: ObjectStore, crawl: CrawlRecord, rows: pa.Table, reasons: np.ndarray, config: RefreshConfig, work: Path
) -> None:
    """Gives the reason low_score, in place, to pictures that the configured function scores below the minimum."""
    if config.score is None or crawl.images is None:
        return
    score = load_score(config.score)
    kept = np.flatnonzero(reasons == "")
    table = rows.take(kept)
    captions = [each[-1]["text"] if each else "" for each in table["captions"].to_pylist()]
    for numbers, pictures in _pictures(store, crawl.images, table, work):
        scores = score(pictures, [captions[number] for number in numbers])
        for number, value in zip(numbers, scores, strict=True):
            if not value >= config.min_score:
                reasons[kept[number]] = "low_score"


def candidates(store: ObjectStore, crawl: CrawlRecord, caption: CaptionRecord, config: RefreshConfig) -> pa.Table:
    """The batch's fetched pictures with their captions, weighed as configured: what filters look at."""
    table = get_table(store, crawl.fetched)
    table = table.filter(pc.equal(table["status"], "ok"))
    captions = get_table(store, caption.captions)["captions"].to_pylist()  # the same pictures in the same order
    if config.captioner != "alt":
        for text in (text for texts in captions for text in texts if text["origin"] == AltText.name):
            text["weight"] = config.alt_weight
    return table.append_column("captions", pa.array(captions, CAPTIONS))


def filter_batch(
    store: ObjectStore,
    batch: Batch,
    crawl: CrawlRecord,
    rows: pa.Table,
    reasons: np.ndarray,
    takedowns: ObjectRef | None,
    settings: str,
) -> FilterRecord:
    """Commits the batch's samples, the `rows` of `candidates` whose reason is empty, in the place of any before."""
    kept = rows.filter(pa.array(reasons == ""))
    images = [
        {"key": crawl.images.key if crawl.images else "", "offset": offset, "size": size}
        for offset, size in zip(kept["offset"].to_pylist(), kept["size"].to_pylist(), strict=True)
    ]
    columns = {name: kept[name] for name in SAMPLES.names if name != "image"}
    samples = pa.table({**columns, "image": pa.array(images, IMAGE)}, schema=SAMPLES)
    lost = pa.table({"key": rows["key"], "dropped": pa.array(list(reasons), pa.string())})
    lost = lost.filter(pc.not_equal(lost["dropped"], ""))
    record = FilterRecord(
        samples=put_table(store, f"{batch.folder}samples", samples),
        dropped=put_table(store, f"{batch.folder}dropped", lost),
        takedowns=takedowns,
        settings=settings,
        count=len(samples),
        reasons=dict(Counter(lost["dropped"].to_pylist())),
        examples=examples(list(reasons), rows["url"].to_pylist()),
    )
    return _replace_record(store, batch, record)  # type: ignore[no-any-return]


def was_asked(fetched: pa.Table) -> pa.ChunkedArray:
    """Which of the URLs were asked for, so that an attempt counts."""
    return pc.invert(pc.is_in(fetched["reason"], pa.array(sorted(UNASKED))))


def retry_rows(store: ObjectStore, crawl: CrawlRecord, max_attempts: int, patience: float) -> tuple[pa.Table, float]:
    """(the batch's URLs worth asking again soon, as rows of a plan; seconds that their servers ask us to wait)."""
    if not crawl.statuses.get("retry"):
        return ROWS.empty_table(), 0.0
    table = get_table(store, crawl.fetched)
    wait = pc.fill_null(table["retry_after"], 0.0)
    attempts = pc.add(table["attempts"], was_asked(table).cast(pa.int16()))
    chosen = pc.and_(pc.equal(table["status"], "retry"), pc.less_equal(wait, patience))
    chosen = pc.and_(chosen, pc.less(attempts, max_attempts))
    rows = table.set_column(table.schema.get_field_index("attempts"), "attempts", attempts).filter(chosen)
    longest = pc.max(wait.filter(chosen)).as_py() or 0.0
    return rows.select(ROWS.names).cast(ROWS), float(longest)
