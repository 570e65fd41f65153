"""What the page of a refresh shows and what it announces, without a server."""

from __future__ import annotations

import types
from typing import Any
from uuid import uuid4

import pyarrow.parquet as pq
import pytest

from pipelines import flows
from pipelines.ledger import Ledger
from pipelines.state import at_once
from pipelines.takedown import TakedownConfig, takedown
from starflow.encoders import EncoderError
from tests.pipelines.fake_crawl import Bench, png, url
from tests.pipelines.kills import KilledError


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a flow would show, by key, and under `events` the snapshots that it announces; without a server."""
    shown: dict[str, Any] = {"events": []}

    def show(*content: Any, key: str, **_: Any) -> None:
        shown[key] = content[0]

    def announce(event: str, resource: Any, payload: dict[str, Any]) -> None:
        shown["events"].append(payload["snapshot"])

    for kind in ("table", "markdown", "image"):
        monkeypatch.setattr(flows, f"create_{kind}_artifact", show)
    monkeypatch.setattr(flows, "create_progress_artifact", lambda *_, **__: uuid4())
    monkeypatch.setattr(flows, "update_progress_artifact", lambda *_, **__: None)
    monkeypatch.setattr(flows, "emit_event", announce)
    monkeypatch.setattr(flows, "get_run_logger", lambda: types.SimpleNamespace(info=lambda *_: None))
    stage = flows.stage_task.fn
    monkeypatch.setattr(flows, "stage_task", types.SimpleNamespace(with_options=lambda **_: stage))
    for each in ("gate_task", "report"):
        monkeypatch.setattr(flows, each, getattr(flows, each).fn)
    monkeypatch.setattr(flows, "batch_task", at_once)
    monkeypatch.setattr(flows, "newest_pictures", lambda *_: b"")
    return shown


def test_what_a_killed_refresh_had_published_is_announced(
    bench: Bench, page: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It died after its snapshot, before it said so; the next run finds nothing new."""
    config = bench.config(bench.write_list({url(0): png(0), url("gone"): ("failed", "http_404")}))

    def killed(*_: Any, **__: Any) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(flows, "emit_event", killed)
        with pytest.raises(KilledError):
            flows.refresh_once(config)
    assert page["events"] == []
    answer = flows.refresh_once(config)
    assert page["events"] == [answer["snapshot"]]
    assert page["refresh-drops"] == [{"reason": "http_404", "samples": 1}]
    assert url("gone") in page["refresh-drop-samples"]
    assert flows.refresh_once(config)["added"] == 0
    assert page["events"] == [answer["snapshot"]]
    assert page["refresh-drop-samples"] == "Nothing was rejected."


def test_what_was_published_since_is_announced_in_its_place(
    bench: Bench, page: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is told to train on a snapshot that has lost samples to a takedown."""
    config = bench.config(bench.write_list({url(0): png(0), url(1): png(1)}))

    def killed(*_: Any, **__: Any) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "commit", killed)
        with pytest.raises(KilledError):
            flows.refresh_once(config)
    newest = takedown(TakedownConfig(store=bench.store, urls=(url(0),))).snapshot
    page["events"].clear()
    flows.refresh_once(config)
    assert page["events"] == [newest]


@pytest.mark.parametrize("error", [EncoderError("cannot load the VAE x"), OSError("cannot load the VAE x")])
def test_a_page_without_pictures_says_why(
    bench: Bench, page: dict[str, Any], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The VAE may be only where the Ray cluster is."""

    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(flows, "newest_pictures", fails)
    config = bench.config(bench.write_list({url(0): png(0)}), gate="automatic")
    answer = flows.refresh_once(config)
    assert page["events"] == [answer["snapshot"]]
    for key in ("refresh-candidates", "refresh-pictures"):
        assert page[key] == "No pictures can be shown: cannot load the VAE x"


def test_texts_of_the_web_are_no_markdown(bench: Bench, page: dict[str, Any]) -> None:
    text = "![](http://host/x) <img src=y> | `a` secret"
    listed = bench.write_list({url(0): png(0), url("a`b"): png(1)})
    table = pq.read_table(listed)
    pq.write_table(table.set_column(1, "caption", [["fine", text]]), listed)
    flows.refresh_once(bench.config(listed, block_words=("secret",)))
    shown = page["refresh-drop-samples"]
    assert r"| \!\[\]\(http\:\/\/host\/x\) \<img src\=y\> \| \`a\` secret |" in shown
    assert f"| `{url('a%60b')}` |" in shown
