"""The job that runs on a Ray cluster: reserves a bundle on each node, keeps a supervisor going in every one of them."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from infra.processes import end_with_parent
from starflow.errors import UNAVAILABLE_STATUS
from starflow.objectstore import open_store
from training.cluster import stop_key
from training.launch import PREEMPTED_STATUS

#: Seconds between looks at the machines and at the request to stop.
LOOK_EVERY = 1.0


class Machine:
    """Runs a supervisor on the node where it lives; prints its output with the machine's number."""

    def __init__(self, node: int) -> None:
        self._node = node
        self._process: subprocess.Popen[str] | None = None

    def run(self, command: list[str], environment: dict[str, str]) -> int:
        """Exit status of the supervisor."""
        place = {"STARFLOW_NODE_RANK": str(self._node), "STARFLOW_ADDRESS": ray.util.get_node_ip_address()}
        variables = {**os.environ, **environment, **place}
        self._process = subprocess.Popen(
            command,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            preexec_fn=end_with_parent,  # Ray may kill this process: then the run saves and leaves
        )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            print(f"{self._node}| {line}", end="", flush=True)
        return self._process.wait()

    def stop(self) -> None:
        """The supervisor saves and leaves."""
        if self._process and self._process.poll() is None:
            self._process.terminate()


class Job:
    """All machines of a launch."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self._plan = plan
        environment = plan["environment"]
        self._nodes = int(environment["STARFLOW_NODES"])
        self._store, self._stop_key = open_store(plan["store"]), stop_key(plan["run"], environment["STARFLOW_LAUNCH"])
        self._machines: dict[int, Any] = {}
        self._running: dict[Any, int] = {}

    def run(self) -> int:
        """Exit status: that of the machines, the worst of them."""
        bundle = {"CPU": self._plan["cpus"], **({"GPU": self._plan["gpus"]} if self._plan["gpus"] else {})}
        group = placement_group([bundle] * self._nodes, strategy="STRICT_SPREAD")
        print(f"waiting for {self._nodes} nodes with {bundle} each", flush=True)
        ray.get(group.ready())
        for node in range(self._nodes):
            self._start(group, node)
        worst, stopping = 0, False
        while self._running:
            done, _ = ray.wait(list(self._running), timeout=LOOK_EVERY)
            for reference in done:
                worst = max(worst, self._finish(group, reference))
            if not stopping and self._store.head(self._stop_key) is not None:
                stopping = True
                for machine in self._machines.values():
                    machine.stop.remote()
        return worst

    def _finish(self, group: PlacementGroup, reference: Any) -> int:
        node = self._running.pop(reference)
        try:
            status = int(ray.get(reference))
        except RayActorError as error:
            print(f"machine {node} was lost: {error}", flush=True)
            self._start(group, node)  # Ray brings it up when the bundle has a node again
            return 0
        if status in (PREEMPTED_STATUS, UNAVAILABLE_STATUS) and self._store.head(self._stop_key) is None:
            self._start(group, node)
            return 0
        return status

    def _start(self, group: PlacementGroup, node: int) -> None:
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=node)
        options = {
            "num_cpus": self._plan["cpus"], "num_gpus": self._plan["gpus"],
            "max_concurrency": 2, "scheduling_strategy": strategy,
        }  # fmt: skip
        self._machines[node] = ray.remote(Machine).options(**options).remote(node)
        reference = self._machines[node].run.remote(self._plan["command"], self._plan["environment"])
        self._running[reference] = node


def main() -> None:
    """``python -m infra.launch.ray_job PLAN`` (JSON); exit status of the machines."""
    ray.init(address="auto", log_to_driver=True, logging_level=logging.WARNING)
    sys.exit(Job(json.loads(sys.argv[1])).run())


if __name__ == "__main__":
    main()
