"""The Prefect flows that write snapshots: refresh, backfill, recaption, with pages that people can read."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any, Literal, cast
from uuid import UUID

from prefect import flow, get_client, get_run_logger, task
from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.blocks.system import Secret
from prefect.cache_policies import NO_CACHE
from prefect.concurrency.sync import concurrency
from prefect.events import emit_event
from prefect.exceptions import FlowPauseTimeout, ObjectAlreadyExists
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from prefect.runtime import flow_run
from prefect.states import Cancelled, State
from pydantic import Field

from pipelines.config import RefreshConfig
from pipelines.deployment import SECRETS, BackfillConfig, limit_name
from pipelines.gate import (
    GateRefusedError,
    Measure,
    candidate,
    candidate_name,
    exceeded,
    is_closed,
    measure,
    refused,
)
from pipelines.recaption import RecaptionConfig
from pipelines.recaption import recaption as run_recaption
from pipelines.refresh import STAGES, RefreshResult, Stage, result, run_stage
from pipelines.report import data_uri, difference, drops_table, newest_pictures
from pipelines.state import RefreshState
from pipelines.workfolder import work_folder
from starflow.errors import StarflowError
from starflow.forms import answer_rows, fields_of, parameters_of
from starflow.objectstore import ObjectStore, open_store
from starflow.snapshots import Snapshot, load_snapshot

#: Emitted after the commit; the automation train-on-publish waits for it.
PUBLISHED_EVENT = "starflow.snapshot.published"
#: Samples in the picture grid of a run's page.
PICTURES = 32
#: Seconds: how long a dead run still holds its store, how long a run waits for another, and for its own crashed self.
LEASE_SECONDS, PATIENCE_SECONDS, PATIENCE_AFTER_CRASH_SECONDS = 60, 3.0, 150.0

Answer = dict[str, Any]


@flow(name="refresh")
@parameters_of(RefreshConfig)
def refresh(**parameters: Any) -> Answer | State[Any]:
    """Crawls, captions, filters and encodes what is new in a list of URLs, and publishes a snapshot."""
    config = RefreshConfig.model_validate(parameters)
    return alone(config.store, lambda: refresh_once(config))


@flow(name="backfill")
@parameters_of(BackfillConfig, RefreshConfig, hidden=("urls",))
def backfill(**parameters: Any) -> Answer | State[Any]:
    """Refreshes from several URL lists, one after the other; what an earlier run has done costs no request again."""
    lists = fields_of(BackfillConfig, parameters).partitions()
    configs = [fields_of(RefreshConfig, parameters, urls=each) for each in lists]
    return alone(configs[0].store, lambda: backfill_lists(configs))


def backfill_lists(configs: Sequence[RefreshConfig]) -> Answer:
    """A refresh for each of `configs`, as a flow run below this one; ends at the first that fails."""
    progress = cast(UUID, create_progress_artifact(0.0, key="backfill-progress", description=configs[0].urls))
    rows: list[dict[str, Any]] = []
    for number, config in enumerate(configs):
        update_progress_artifact(progress, 100.0 * number / len(configs), description=config.urls)
        answer = refresh_list.with_options(flow_run_name=config.urls.rsplit("/", 1)[-1])(config.model_dump(mode="json"))
        rows.append({"list": config.urls} | {key: answer[key] for key in ("snapshot", "added", "total")})
    update_progress_artifact(progress, 100.0, description=f"{len(configs)} lists")
    create_table_artifact(rows, key="backfill-lists", description="Snapshot after each list")
    total = {"lists": len(rows), "snapshot": rows[-1]["snapshot"], "added": sum(row["added"] for row in rows)}
    create_table_artifact(answer_rows(total), key="backfill-answer", description="Backfill")
    return total


@flow(name="refresh-list", validate_parameters=False)
def refresh_list(settings: dict[str, Any]) -> Answer:
    """One list of a backfill: an ordinary refresh, under the backfill's own hold of the store."""
    return refresh_once(RefreshConfig.model_validate(settings))


@flow(name="recaption")
@parameters_of(RecaptionConfig)
def recaption(**parameters: Any) -> Answer | State[Any]:
    """Adds captions to every picture of a snapshot, or weighs captions anew, and publishes the next snapshot."""
    config = RecaptionConfig.model_validate(parameters)

    def work() -> Answer:
        page = RunPage("recaption", ("caption", "text", "publish"))
        done = run_recaption(config, page.on_event)
        answer = done.model_dump(mode="json")
        store = open_store(config.store)
        snapshot = load_snapshot(store, done.snapshot)
        if done.captioned or done.reused:
            announce(store, snapshot)
        page.finish()
        create_table_artifact(answer_rows(answer), key="recaption-answer", description=f"Snapshot {snapshot.id}")
        show_pictures(store, snapshot, "recaption-pictures", "Pictures with their heaviest captions, decoded.")
        return answer

    return alone(config.store, work)


def alone(store: str, work: Callable[[], Answer]) -> Answer | State[Any]:
    """What `work` returns, done while nobody else writes snapshots to `store`; else this run ends as Cancelled.

    A crash leaves the hold for `LEASE_SECONDS`; the same run, rescheduled, waits for it.
    """
    secrets_to_environment()
    name = limit_name(store)
    with get_client(sync_client=True) as client, suppress(ObjectAlreadyExists):
        client.upsert_global_concurrency_limit_by_name(name, 1)
    patience = PATIENCE_AFTER_CRASH_SECONDS if (flow_run.run_count or 1) > 1 else PATIENCE_SECONDS
    with ExitStack() as hold:
        try:
            hold.enter_context(
                concurrency(
                    name,
                    timeout_seconds=patience,
                    lease_duration=LEASE_SECONDS,
                    strict=True,
                    # Two at once would be safe: of two publishers one is told to go on from the other's snapshot.
                    raise_on_lease_renewal_failure=False,
                )
            )
        except TimeoutError:
            return Cancelled(message=f"Another run adds snapshots to {store}; this one was not needed.")
        return work()


def secrets_to_environment() -> None:
    """Fills unset environment variables from the server's secret blocks, where these exist and hold something."""
    for block, variable in SECRETS.items():
        if variable in os.environ:
            continue
        with suppress(ValueError):  # there is no such block
            if value := cast(Secret[str], Secret.load(block)).get():
                os.environ[variable] = value


def refresh_once(config: RefreshConfig) -> Answer:
    """The stages of a refresh as tasks, the gate between encode and publish, and the page."""
    page = RunPage("refresh", [stage.name for stage in STAGES])
    counts: dict[str, dict[str, Any]] = {}
    with work_folder() as work:

        def on_event(event: dict[str, Any]) -> None:
            if event["event"] == "published":
                announce(state.store, event["snapshot"])
            else:
                page.on_event(event)

        def run(stage: Stage) -> None:
            counts[stage.name] = stage_task.with_options(name=stage.name, task_run_name=stage.name)(state, stage)

        state = RefreshState(config, work, on_event, batch_task)
        *before, publish = STAGES
        for stage in before:
            run(stage)
        number = state.name if state.plans else state.recovered or state.name
        if is_closed(state):
            pass_gate(state, counts)
        run(publish)
        answer = result(state)
    snapshot = load_snapshot(state.store, answer.snapshot)
    page.finish()
    report(state.store, snapshot, answer, number)
    return answer.model_dump()


@task(cache_policy=NO_CACHE)  # the stages keep a durable record of their own
def stage_task(state: RefreshState, stage: Stage) -> dict[str, Any]:
    """One stage; returns its counts."""
    return run_stage(state, stage)


def batch_task(name: str, work: Callable[[], Any]) -> Any:
    """Does a batch of the crawl as a task, whose log and artifact hold its counts."""

    @task(name="batch", task_run_name=name, cache_policy=NO_CACHE)
    def batch() -> Any:
        record = work()
        found = record.statuses | {f"dropped: {reason}": count for reason, count in record.reasons.items()}
        get_run_logger().info("%s: %s", name, ", ".join(f"{what} {count:,}" for what, count in found.items()))
        rows = [{"outcome": what, "URLs": count} for what, count in found.items()]
        create_table_artifact(rows, key="refresh-batch", description=name)
        return record

    return batch()


class Review(RunInput):
    """What a person decides at the gate."""

    decision: Literal["publish", "refuse", "discard"] = Field(
        title="Decision",
        description="publish; refuse: publish nothing now, the next refresh takes the work up again; discard: publish "
        "nothing and forget what was crawled.",
    )
    note: str = Field("", title="Note", description="For the run's log.")


def pass_gate(state: RefreshState, counts: Mapping[str, Mapping[str, Any]]) -> None:
    """Returns when publishing is allowed. Raises GateRefusedError when it is not."""
    config, name = state.config, candidate_name(state)
    over = exceeded(gate_task(state, counts))
    if config.gate == "automatic":
        if over:
            raise refused(state, f"the gate refuses candidate {name}: {over}")
        return
    question = f"The artifacts of this run show what would be published. Over a limit: {over or 'nothing'}."
    try:
        review = pause_flow_run(
            wait_for_input=Review.with_initial_data(description=question),
            timeout=round(3600 * config.gate_hours),
            key="gate",
        )
    except FlowPauseTimeout as error:
        raise refused(state, f"nobody decided about candidate {name} within {config.gate_hours:g} hours") from error
    get_run_logger().info("a person decided: %s %s", review.decision, review.note)
    if review.decision == "discard":
        state.workspace.delete()
        raise GateRefusedError("a person has discarded this refresh; its URLs are asked anew next time")
    if review.decision == "refuse":
        raise refused(state, f"a person has refused candidate {name}")


@task(name="gate", task_run_name="gate", cache_policy=NO_CACHE)
def gate_task(state: RefreshState, counts: Mapping[str, Mapping[str, Any]]) -> list[Measure]:
    """Measures what is about to be published; shows the figures and some of the pictures."""
    measures = measure(state, counts)
    rows = [
        {
            "what": each.name,
            "share": f"{each.value:.2%}",
            "limit": f"{each.limit:.2%}",
            "passed": "yes" if each.passed else "NO",
            "detail": each.detail,
        }
        for each in measures
    ]
    create_table_artifact(rows, key="refresh-gate", description="Before publishing")
    if new := candidate(state):
        show_pictures(state.store, new, "refresh-candidates", "Samples that are not yet published.")
    return measures


class RunPage:
    """What the run's page shows while it works: progress through the stages."""

    def __init__(self, name: str, stages: Sequence[str]) -> None:
        first = create_progress_artifact(0.0, key=f"{name}-progress", description="starting")
        self._artifact = cast(UUID, first)
        self._order = list(stages)
        self._written = 0.0

    def on_event(self, event: dict[str, Any]) -> None:
        """Takes the events of pipelines.refresh; progress is written at most once a second."""
        if event["event"] == "progress":
            total = event["total"]
            if time.monotonic() - self._written >= 1.0:
                part = event["done"] / total if total else 0.0
                self._write(event["stage"], part, f"{event['stage']}: {event['done']} of {total or 'unknown'}")
        elif event["event"] == "stage" and event["state"] == "started":
            self._write(event["stage"], 0.0, event["stage"])
        elif event["event"] == "stage":
            get_run_logger().info("%s took %.1f s: %s", event["stage"], event["seconds"], event["counts"])

    def finish(self) -> None:
        update_progress_artifact(self._artifact, 100.0, description="published")

    def _write(self, stage: str, part: float, description: str) -> None:
        self._written = time.monotonic()
        percent = 100.0 * (self._order.index(stage) + min(part, 1.0)) / len(self._order)
        update_progress_artifact(self._artifact, percent, description=description)


def announce(store: ObjectStore, snapshot: Snapshot) -> None:
    """Tells the server's automations that `snapshot` is committed."""
    emit_event(
        PUBLISHED_EVENT,
        resource={"prefect.resource.id": f"starflow.store.{store.url}", "prefect.resource.name": store.url},
        payload={"snapshot": snapshot.id, "store": store.url, "total": snapshot.counts.total},
    )


@task(cache_policy=NO_CACHE)
def report(store: ObjectStore, snapshot: Snapshot, answer: RefreshResult, number: str) -> None:
    """Artifacts of refresh `number`: answer, drops by reason, difference to the parent, pictures with captions."""
    create_table_artifact(answer_rows(answer.model_dump()), key="refresh-answer", description=f"Snapshot {snapshot.id}")
    drops = sorted(answer.dropped.items(), key=lambda item: -item[1])
    create_table_artifact(
        [{"reason": reason, "samples": count} for reason, count in drops],
        key="refresh-drops",
        description="What this refresh rejected, by reason",
    )
    create_markdown_artifact(
        drops_table(store, number), key="refresh-drop-samples", description="Samples of what was rejected"
    )
    parent = load_snapshot(store, snapshot.parent) if snapshot.parent else None
    create_markdown_artifact(difference(parent, snapshot), key="refresh-difference", description="Against the parent")
    show_pictures(store, snapshot, "refresh-pictures", "Newest samples, decoded from their latents.")


def show_pictures(store: ObjectStore, snapshot: Snapshot, key: str, what: str) -> None:
    """An image artifact with the snapshot's newest samples; where there is none, or no VAE to decode them, it says so.

    The VAE may be only where the Ray cluster is, and pictures must not keep a refresh from publishing.
    """
    try:
        picture = newest_pictures(store, snapshot, PICTURES)
    except (StarflowError, OSError, RuntimeError) as error:  # the last: a GPU that has no memory left
        create_markdown_artifact(f"No pictures can be shown: {error}", key=key, description=what)
        return
    if picture is None:
        create_markdown_artifact("This snapshot holds no sample.", key=key, description=what)
        return
    description = f"{what} {snapshot.attribution or ''}".strip()
    create_image_artifact(data_uri(picture), key=key, description=description)
