"""Samples of what a refresh rejected, by reason, with thumbnails where the pictures were fetched."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.batches import CrawlRecord, FilterRecord, get_table, load_record
from pipelines.plan import Batch, Plan, Workspace
from starflow.config import Config
from starflow.errors import NotFoundError
from starflow.images import ImageError, decode_image
from starflow.objectstore import ObjectStore

#: Longest side of a thumbnail, in pixels.
THUMBNAIL = 128
_CAPTION = 200


class Drop(Config):
    """One rejected URL: what was wrong with it, and a small JPEG when its picture was fetched."""

    url: str
    detail: str
    thumbnail: bytes | None = None


def drop_samples(store: ObjectStore, refresh: str, limit: int = 5) -> dict[str, list[Drop]]:
    """Up to `limit` URLs of each reason for which refresh number `refresh` rejected some, sorted by reason.

    `refresh` is what a snapshot's versions call it. Takedowns are not shown; what `starflow snapshots gc` has erased
    comes without thumbnail. A refresh that left nothing behind gives an empty answer.
    """
    found: defaultdict[str, list[Drop]] = defaultdict(list)
    plans = Workspace(store, int(refresh)).plans()
    for plan in plans:
        for batch in plan.batches:
            for reason, row, crawl in _rejected(store, batch, limit, found):
                if row["status"] == "retry" and _asked_again(store, plans, plan, row["key"]):
                    continue  # what became of it is in a later plan
                thumbnail = _thumbnail(store, crawl, row)
                found[reason].append(Drop(url=row["url"], detail=_detail(reason, row), thumbnail=thumbnail))
    return {reason: drops for reason, drops in sorted(found.items()) if drops}


def _rejected(
    store: ObjectStore, batch: Batch, limit: int, found: dict[str, list[Drop]]
) -> Iterator[tuple[str, dict[str, Any], CrawlRecord]]:
    """(reason, row of the batch's table, its record) for reasons of which `found` has too few; a batch without any
    such costs its records only."""
    records = [load_record(store, batch, kind) for kind in (CrawlRecord, FilterRecord)]
    wanted = [
        (reason, url)
        for record in records
        if record is not None
        for reason, urls in record.examples.items()
        if reason != "takedown"
        for url in urls[: max(0, limit - len(found[reason]))]
    ]
    if not wanted:
        return
    table = get_table(store, records[0].fetched)
    table = table.filter(pc.is_in(table["url"], pa.array([url for _, url in wanted])))
    rows = {row["url"]: row for row in table.to_pylist()}
    yield from ((reason, rows[url], records[0]) for reason, url in wanted if url in rows)


def _asked_again(store: ObjectStore, plans: list[Plan], plan: Plan, key: str) -> bool:
    later = [batch for each in plans if plan.number in each.covers for batch in each.batches]
    return any(pc.any(pc.equal(get_table(store, batch.rows)["key"], key)).as_py() for batch in later)


def _detail(reason: str, row: dict[str, Any]) -> str:
    """What one wants to know besides the reason."""
    if row["status"] != "ok":
        return f"HTTP {row['http']}" if row["http"] else "no answer"
    if reason.startswith("text") or reason in ("language", "blocked_word"):
        return str(row["caption"])[:_CAPTION]
    if reason == "blank":
        return f"spread {row['spread']:.2f}"
    return f"{row['width']} x {row['height']} px"


def _thumbnail(store: ObjectStore, crawl: CrawlRecord, row: dict[str, Any]) -> bytes | None:
    if crawl.images is None or row["offset"] is None:
        return None
    try:
        image = decode_image(store.read(crawl.images.key, row["offset"], row["size"]))
    except (NotFoundError, ImageError):
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()
