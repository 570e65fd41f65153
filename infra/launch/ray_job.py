"""The job that runs on a Ray cluster: reserves a bundle on each node, keeps a supervisor going in every one of them."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from infra.processes import end_with_parent
from starflow.checkpoints import list_steps
from starflow.errors import UNAVAILABLE_STATUS, StoreError
from starflow.objectstore import open_store
from training.cluster import stop_key
from training.launch import PREEMPTED_STATUS

#: Seconds between looks at the machines and at the request to stop; longest wait before a machine starts again.
LOOK_EVERY, LONGEST_WAIT = 1.0, 60.0
#: How often a machine is started again before the run has a new checkpoint: for about five minutes.
MOST_RESTARTS = 10


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


class Restarts:
    """How long each machine waits before it is started again; none is for ever.

    A new checkpoint of the run, by whichever machines, gives all of them their attempts and short waits back.
    """

    def __init__(self, committed: Callable[[], int | None]) -> None:
        """`committed`: the newest step; None where there is none or the store does not answer."""
        self._committed, self._step = committed, committed()
        self._counts: dict[int, int] = {}

    def wait(self, node: int) -> float | None:
        """Seconds, or None when the machine has used up its attempts."""
        step = self._committed()
        if step is not None and step != self._step:
            self._step, self._counts = step, {}
        count = self._counts[node] = self._counts.get(node, 0) + 1
        return None if count > MOST_RESTARTS else min(LONGEST_WAIT, 2.0 ** (count - 1))


class Job:
    """All machines of a launch."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self._plan = plan
        environment = plan["environment"]
        self._nodes = int(environment["STARFLOW_NODES"])
        self._store, self._stop_key = open_store(plan["store"]), stop_key(plan["run"], environment["STARFLOW_LAUNCH"])
        self._restarts = Restarts(self._committed)
        self._machines: dict[int, Any] = {}
        self._running: dict[Any, int] = {}
        self._waiting: dict[int, float] = {}  # machine: when it starts again

    def run(self) -> int:
        """Exit status: that of the machines, the worst of them."""
        bundle = {"CPU": self._plan["cpus"], **({"GPU": self._plan["gpus"]} if self._plan["gpus"] else {})}
        group = placement_group([bundle] * self._nodes, strategy="STRICT_SPREAD")
        print(f"waiting for {self._nodes} nodes with {bundle} each", flush=True)
        ray.get(group.ready())
        for node in range(self._nodes):
            self._start(group, node)
        return self._watch(group)

    def _watch(self, group: PlacementGroup) -> int:
        worst, stopping = 0, False
        while self._running or self._waiting:
            for reference in self._ended():
                worst = max(worst, self._finish(reference))
            if not stopping and self._stop_asked():
                stopping = True
                self._waiting.clear()
                for machine in self._machines.values():
                    machine.stop.remote()
            for node in [node for node, due in self._waiting.items() if time.monotonic() >= due]:
                del self._waiting[node]
                self._start(group, node)
        return worst

    def _ended(self) -> list[Any]:
        if not self._running:
            time.sleep(LOOK_EVERY)
            return []
        return list(ray.wait(list(self._running), timeout=LOOK_EVERY)[0])

    def _finish(self, reference: Any) -> int:
        """Exit status that counts, or 0 for a machine that starts again."""
        node = self._running.pop(reference)
        try:
            status = int(ray.get(reference))
        except RayActorError as error:  # Ray brings it up when the bundle has a node again
            print(f"machine {node} was lost: {error}", flush=True)
            status = PREEMPTED_STATUS
        if status not in (PREEMPTED_STATUS, UNAVAILABLE_STATUS) or self._stop_asked():
            return status
        seconds = self._restarts.wait(node)
        if seconds is None:
            print(f"machine {node} left {MOST_RESTARTS} times without a new checkpoint: not started again", flush=True)
            return status
        print(f"machine {node} left with status {status}: starting it again in {seconds:g} s", flush=True)
        self._waiting[node] = time.monotonic() + seconds
        return 0

    def _stop_asked(self) -> bool:
        try:
            return self._store.head(self._stop_key) is not None
        except StoreError:  # asked again
            return False

    def _committed(self) -> int | None:
        try:
            return max(list_steps(self._store, self._plan["run"]), default=None)
        except StoreError:
            return None

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
