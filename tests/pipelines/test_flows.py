"""The refresh flow: its form, and one real run through server and worker."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.utilities.callables import parameter_schema

from infra.prefect_client import PrefectAPI, run_refresh_deployment
from infra.stack import LocalStack
from pipelines.config import RefreshConfig
from pipelines.deployment import BackfillConfig
from pipelines.flows import backfill, refresh
from pipelines.report import newest_pictures
from starflow.encoders import VAEIdentity
from starflow.errors import StarflowError
from starflow.objectstore import open_store
from starflow.snapshots import Counts, Snapshot, list_snapshots

FORM = Path(__file__).with_name("refresh_form.json")


def form(flow: Any = refresh) -> dict[str, Any]:
    """The form as the UI gets it."""
    return parameter_schema(flow).model_dump_for_openapi()


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Path]:
    """A URL list of eight noisy pictures on loopback, and one that is missing."""
    from tests.infra.small_work import serve_pictures  # not found when this file runs as a script

    with serve_pictures(tmp_path, 8) as urls:
        yield urls


def test_form_is_flat_and_explains_every_field() -> None:
    properties = form()["properties"]
    assert list(properties) == list(RefreshConfig.model_fields)
    assert form()["required"] == ["urls", "store"]
    for name, field in properties.items():
        assert field["title"] == RefreshConfig.model_fields[name].title
        assert field["description"] == RefreshConfig.model_fields[name].description
        assert "default" in field or name in form()["required"]


def test_backfill_asks_for_lists_instead_of_one_list() -> None:
    own, shared = form(backfill), form()
    assert own["required"] == ["lists", "store"]
    assert own["properties"].keys() == BackfillConfig.model_fields.keys() | shared["properties"].keys() - {"urls"}
    for name in shared["properties"].keys() - {"urls"}:
        ours, theirs = (dict(each["properties"][name], position=0) for each in (own, shared))
        assert ours == theirs


def test_a_snapshot_without_samples_has_no_pictures(tmp_path: Path) -> None:
    """A takedown may leave none."""
    identity = VAEIdentity(name="emoji", sha256="0" * 64, scaling_factor=1.0, channels=4, downsampling=2)
    empty = Snapshot(
        id="00000002-0", number=2, parent=None, created="", image_size=32, vae=identity, dropped={}, sources={},
        versions={}, attribution=None, counts=Counts(added=0, kept=0, total=0), parts=(),
    )  # fmt: skip
    assert newest_pictures(open_store(str(tmp_path)), empty, 8) is None


def test_form_has_not_changed_unnoticed() -> None:
    """After a wanted change: `python tests/pipelines/test_flows.py` rewrites the snapshot."""
    assert form() == json.loads(FORM.read_text())


@pytest.mark.slow  # tests/test_end_to_end.py has a refresh, and what its page shows, among the fast ones
def test_refresh_through_server_and_worker(stack: LocalStack, web: Path) -> None:
    from tests.infra.small_work import artifacts_of, newest_run  # not found when this file runs as a script

    api, store = PrefectAPI(stack.state.env["PREFECT_API_URL"]), f"{stack.state.store}/test-flows"
    parameters = {"urls": str(web), "store": store, "allow_host": ["127.0.0.1"], "text_encoder": None, "actors": 1}
    seen: list[str] = []
    answer = run_refresh_deployment(stack.state.env, parameters, seen.append)
    assert answer["added"] == answer["total"] == 8
    assert answer["dropped"] == {"http_404": 1}
    assert set(answer["seconds"]) == {"plan", "crawl", "caption", "filter", "encode", "publish"}
    assert seen[-1] == "Completed, published 100 %"

    run = newest_run(api, "refresh/refresh-now")
    page = artifacts_of(api, run)
    assert json.loads(page["refresh-drops"]) == [{"reason": "http_404", "samples": 1}]
    assert {"refresh-progress", "refresh-answer", "refresh-pictures", "refresh-difference"} <= page.keys()
    tasks = api.post("/task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
    assert "batch 000-000000 of 9 URLs" in {task["name"] for task in tasks}, "each crawl batch is a task of its own"
    counted = {row["outcome"]: row["URLs"] for row in json.loads(page["refresh-batch"])}
    assert counted["ok"] == 8
    assert counted["dropped: http_404"] == 1


def test_failure_is_the_flows_own_sentence_and_publishes_nothing(
    stack: LocalStack, s3_url: str, tmp_path: Path
) -> None:
    missing = tmp_path / "no-such-list.parquet"
    parameters = {"urls": str(missing), "store": s3_url, "contact": "test@example.org"}
    with pytest.raises(StarflowError, match=r"refresh-now ended as Failed: .*no-such-list.* \(log: http"):
        run_refresh_deployment(stack.state.env, parameters)
    assert list_snapshots(open_store(s3_url)) == []


if __name__ == "__main__":
    FORM.write_text(json.dumps(form(), indent=1) + "\n")
