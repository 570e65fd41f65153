"""The three daily jobs by clicking: schedule refreshes, watch a snapshot start a training, stop it and resume it.

`python -m tests.infra.test_browser` does the same on a stack of its own and rewrites docs/images/ui-*.png.
"""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from infra.prefect_client import PrefectAPI
from infra.stack import LocalStack
from starflow.checkpoints import list_steps
from starflow.objectstore import open_store
from starflow.snapshots import load_snapshot
from tests.infra.prefect_ui import PrefectUI, find_chromium, open_ui
from tests.infra.small_work import (
    SMALL_RUN,
    at_work_on,
    committed_steps,
    process_of,
    serve_pictures,
    training_on_publish,
    training_started_by,
    wait_for,
    wait_for_reschedule,
    wait_for_state,
)

IMAGES = Path(__file__).parents[2] / "docs" / "images"


@pytest.mark.browser
@pytest.mark.timeout(1800)
@pytest.mark.skipif(find_chromium() is None, reason="no Chromium: install your system's chromium package")
def test_a_day_in_the_ui(stack: LocalStack, s3_url: str, tmp_path: Path) -> None:
    with open_ui(stack.state.ui) as ui:
        a_day(ui, stack, s3_url, tmp_path)


def a_day(ui: PrefectUI, stack: LocalStack, store: str, work: Path) -> None:
    """Turns the nightly schedule on and off, refreshes, watches, stops and resumes the training that follows."""
    api = PrefectAPI(stack.state.env["PREFECT_API_URL"])
    with nightly_put_back_afterwards(api):
        the_jobs(ui, api, stack, store, work)
    assert ui.strangers == set(), "the UI asks nobody but this server"


def the_jobs(ui: PrefectUI, api: PrefectAPI, stack: LocalStack, store: str, work: Path) -> None:
    turn_the_schedule_on(ui, api)
    with serve_pictures(work, 40) as urls, training_on_publish(api, enabled=False) as automation:
        ui.toggle_automation("train-on-publish")
        wait_for("the automation", lambda: api.get(f"/automations/{automation['id']}")["enabled"], 30)
        ui.shoot("automations")
        refresh_by_form(ui, api, store, urls)
        stop_and_resume(ui, api, stack, store)
    turn_the_schedule_off(ui, api)


@contextmanager
def nightly_put_back_afterwards(api: PrefectAPI) -> Iterator[None]:
    """Also when the test has failed: other tests use the same server."""
    deployment = api.get("/deployments/name/refresh/refresh-nightly")
    path = f"/deployments/{deployment['id']}"
    try:
        yield
    finally:
        api.patch(path, {"parameters": deployment["parameters"]})
        api.patch(f"{path}/schedules/{deployment['schedules'][0]['id']}", {"active": False})


def turn_the_schedule_on(ui: PrefectUI, api: PrefectAPI) -> None:
    """With the list that it is to refresh from, as its deployment's page says."""
    ui.open_deployment("refresh-nightly")
    ui.edit_deployment()
    ui.fill("URL list", "s3://my-bucket/urls.parquet")
    ui.shoot("edit")
    ui.save()
    ui.toggle_schedule()
    found = api.get("/deployments/name/refresh/refresh-nightly")
    assert found["parameters"]["urls"] == "s3://my-bucket/urls.parquet"
    deployment = found["id"]
    wanted = {"deployments": {"id": {"any_": [deployment]}}, "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
    wait_for("runs of the schedule", lambda: api.post("/flow_runs/count", wanted), 60)
    ui.tab("Upcoming")
    ui.page.get_by_text("Scheduled").filter(visible=True).first.wait_for()
    ui.shoot("schedule")


def turn_the_schedule_off(ui: PrefectUI, api: PrefectAPI) -> None:
    ui.open_deployment("refresh-nightly")
    ui.toggle_schedule()
    wait_for(
        "the end of the schedule",
        lambda: not api.get("/deployments/name/refresh/refresh-nightly")["schedules"][0]["active"],
        30,
    )


def refresh_by_form(ui: PrefectUI, api: PrefectAPI, store: str, urls: Path) -> None:
    """A bad value is refused in the form; corrected, the run shows its graph and its pictures."""
    ui.open_deployment("refresh-now")
    ui.custom_run()
    ui.fill("URL list", "s3://my-bucket/urls.parquet")
    ui.shoot("form")
    ui.fill("URL list", str(urls))
    ui.fill("Store", store)
    ui.add("Own hosts", "127.0.0.1")
    ui.fill("Ray actors", "1")
    ui.fill("Image size", "1")
    form = ui.page.url
    ui.submit()
    ui.page.get_by_text("1 is less than the minimum of 8").first.wait_for()
    assert ui.page.url == form
    ui.field("Image size").scroll_into_view_if_needed()
    ui.shoot("refused")
    ui.fill("Image size", "32")
    ui.submit()
    flow_run = wait_for("the refresh", lambda: run_on(api, "refresh/refresh-now", store), 60)
    wait_for_state(api, flow_run, "Completed", 600)
    ui.open_run(flow_run)
    ui.tab("Task Runs")
    ui.page.get_by_text("batch 000-000000 of 41 URLs").first.wait_for()
    ui.shoot("run")
    ui.open_artifact("refresh-pictures")
    assert ui.picture_width() > 32
    ui.shoot("pictures")


def run_on(api: PrefectAPI, deployment: str, store: str) -> str:
    """Id of the deployment's flow run on `store`; "" before there is one."""
    wanted = {"flow_runs": {"deployment_id": {"any_": [api.get(f"/deployments/name/{deployment}")["id"]]}}}
    runs = api.post("/flow_runs/filter", wanted)
    return next((str(run["id"]) for run in runs if run["parameters"].get("store") == store), "")


def stop_and_resume(ui: PrefectUI, api: PrefectAPI, stack: LocalStack, store: str) -> None:
    """The training that the snapshot has started is cancelled at a checkpoint, retried, killed, and completes."""
    opened = open_store(store)
    snapshot = load_snapshot(opened).id
    flow_run, run = training_started_by(api, snapshot)["id"], f"on-{snapshot[:12]}"
    ui.open_run(flow_run)
    wait_for("a checkpoint", lambda: list_steps(opened, run), 300)
    ui.shoot("training")
    ui.cancel()
    wait_for("the end of all processes", lambda: not at_work_on(stack, run), 120)
    wait_for_state(api, flow_run, "Cancelled", 60)
    stopped_at = list_steps(opened, run)[-1]
    assert stopped_at < SMALL_RUN["steps"]
    ui.open_run(flow_run)
    ui.open_artifact("train-resume")
    ui.page.get_by_text("starflow launch").first.wait_for()
    ui.shoot("resume")
    ui.open_run(flow_run)
    ui.retry()
    wait_for("a later checkpoint", lambda: list_steps(opened, run)[-1] > stopped_at, 300)
    process_of(stack, flow_run).send_signal(signal.SIGKILL)
    ui.page.get_by_text("Crashed").first.wait_for()
    wait_for_reschedule(api, flow_run)
    wait_for_state(api, flow_run, "Completed", 600)
    assert committed_steps(store, run) == list(range(1, SMALL_RUN["steps"] + 1))
    for key in ("train-samples", "train-curves"):
        ui.open_run(flow_run)
        ui.open_artifact(key)
        assert ui.picture_width() > 32
        ui.shoot(key.removeprefix("train-"))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="starflow-") as name, LocalStack(Path(name) / "stack") as own:
        own.activate()
        (Path(name) / "work").mkdir()
        with open_ui(own.state.ui, IMAGES) as pages:
            a_day(pages, own, own.state.store, Path(name) / "work")
