"""Launching on an existing Ray cluster: a Ray job that reserves the nodes and runs a supervisor on each."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import Field

from infra.launch.common import Launch, LaunchConfig, Node, NodeState, passed_variables, place_variables, settings
from starflow.config import Config
from starflow.errors import NotFoundError, StarflowError

#: A line of a machine, as Ray passes it on: "(Machine pid=7, ip=10.0.0.1) 0| text".
LINE = re.compile(r"(\(Machine pid=[^)]*\) )?(?P<node>\d+)\| (?P<text>.*)")
STATES: dict[str, NodeState] = {"PENDING": "pending", "RUNNING": "running"}


class RaySettings(Config):
    """The cluster and what each of its nodes gives. Its nodes must have this project installed."""

    address: str = Field(
        default_factory=lambda: os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265"),
        description="Address of the cluster's dashboard, which takes jobs.",
    )
    cpus_per_node: float = Field(1, gt=0, description="CPUs that the run reserves on each node.")
    environment: tuple[str, ...] = Field(
        (), description="Variables of this shell to pass on, beside AWS_, HF_, WANDB_."
    )
    python: str = Field("", description="Python of the environment on the nodes; this one's path if left out.")


class RayLauncher:
    """One job of the cluster's Jobs API. Its log holds the lines of all machines, each with its number."""

    def __init__(self, launch: LaunchConfig) -> None:
        self._settings = settings(RaySettings, launch)

    def render(self, launch: Launch) -> str:
        python = self._settings.python or sys.executable
        plan = {
            "command": list(launch.command),
            "environment": place_variables(launch),
            "store": launch.store,
            "run": launch.run,
            "cpus": self._settings.cpus_per_node,
            "gpus": launch.launch.gpus_per_node,
        }
        return shlex.join([python, "-m", "infra.launch.ray_job", json.dumps(plan)])

    def submit(self, launch: Launch) -> dict[str, Any]:
        """Credentials travel in the job's environment, which who may use the cluster's dashboard can read."""
        # Plain lines, and all of them.
        plain = {"RAY_DEDUP_LOGS": "0", "RAY_COLOR_PREFIX": "0"}
        variables = {**passed_variables(self._settings.environment), **plain}
        with self._cluster(self._settings.address) as client:
            client.submit_job(
                entrypoint=self.render(launch), submission_id=launch.name, runtime_env={"env_vars": variables}
            )
        return {"job": launch.name, "address": self._settings.address}

    def nodes(self, launch: Launch) -> list[Node]:
        try:
            with self._cluster(launch.handle["address"]) as client:
                details = client.get_job_info(launch.name)
            state, said = STATES.get(str(details.status.value), "ended"), details.message or details.status.value
        except NotFoundError:  # the cluster was started anew, or has forgotten it
            state, said = "ended", "unknown to the cluster"
        return [
            Node(node=node, host="", state=state, detail=f"job {launch.name}: {said}")
            for node in range(launch.launch.nodes)
        ]

    def logs(self, launch: Launch, node: int, follow: bool) -> Iterator[str]:
        """Lines of that machine, and of the job itself."""
        for line in self._lines(launch, follow):
            found = LINE.fullmatch(line)
            if found is None:
                yield line
            elif int(found["node"]) == node:
                yield found["text"]

    def stop(self, launch: Launch, force: bool) -> None:
        """The job sees the request in the store within a second; stopping it through Ray leaves no time to save."""
        if force:
            with self._cluster(launch.handle["address"]) as client:
                client.stop_job(launch.name)

    def _lines(self, launch: Launch, follow: bool) -> Iterator[str]:
        with self._cluster(launch.handle["address"]) as client:
            yield from self._follow(client, launch) if follow else client.get_job_logs(launch.name).splitlines()

    def _follow(self, client: Any, launch: Launch) -> Iterator[str]:
        import asyncio

        stream = client.tail_job_logs(launch.name)
        loop = asyncio.new_event_loop()
        rest = ""
        try:
            while True:
                try:
                    rest += loop.run_until_complete(anext(stream))
                except StopAsyncIteration:
                    break
                *whole, rest = rest.split("\n")
                yield from whole
        finally:
            loop.close()
        if rest:
            yield rest

    @contextmanager
    def _cluster(self, address: str) -> Iterator[Any]:
        """The cluster's client. Its errors become StarflowErrors; NotFoundError: it does not know the job."""
        from ray.exceptions import RayError
        from ray.job_submission import JobSubmissionClient

        try:
            client = JobSubmissionClient(address)
        except (OSError, RuntimeError, RayError) as error:
            said = " ".join(str(error).split())
            raise StarflowError(f"no Ray cluster answers at {address}: {said}; set cluster.address") from error
        try:
            yield client
        except (OSError, RuntimeError, RayError) as error:
            kind = NotFoundError if "status code 404" in str(error) else StarflowError
            raise kind(f"the Ray cluster at {address} refuses: {' '.join(str(error).split())}") from error
