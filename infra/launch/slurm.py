"""Launching on Slurm: one sbatch script that starts a supervisor a node and re-queues itself after a preemption."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from infra.launch.common import Launch, LaunchConfig, Node, NodeState, exports, place_variables, settings
from infra.launch.tools import call
from starflow.config import Config
from starflow.errors import UNAVAILABLE_STATUS, NotFoundError, StarflowError
from training.launch import PREEMPTED_STATUS

#: Slurm's job states in which the job waits for its nodes; those in which it has them.
WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
WORKING = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}


#: How often a job may have been re-queued, for whatever reason, and still be for a store that gives no answer.
MOST_RESTARTS = 20


class SlurmSettings(Config):
    """How to ask Slurm for nodes. Environment, working folder and this Python must be on a shared file system."""

    partition: str | None = Field(None, description="Partition; the cluster's default if left out.")
    account: str | None = Field(None, description="Account that is charged.")
    qos: str | None = Field(None, description="Quality of service.")
    time: str | None = Field(None, description="Time limit, such as 1-00:00:00; the run goes on in the next job.")
    cpus_per_node: int = Field(8, gt=0, description="CPU cores of each node.")
    memory: str | None = Field(None, description="Memory of each node, such as 512G.")
    notice: int = Field(120, gt=10, description="Seconds before the time limit at which the run saves and leaves.")
    options: tuple[str, ...] = Field((), description="More #SBATCH options, such as --constraint=h100.")
    setup: str = Field("", description="Shell lines that run on each node first, such as module load cuda.")
    logs: str = Field("", description="Folder of the log on the shared file system; the working folder if left out.")
    python: str = Field("", description="Python of the environment on the nodes; this one's path if left out.")


class SlurmLauncher:
    """One job. sbatch hands the environment of this shell to it (credentials too), not through files."""

    def __init__(self, launch: LaunchConfig) -> None:
        self._settings = settings(SlurmSettings, launch)

    def render(self, launch: Launch) -> str:
        """The sbatch script. Slurm tells each task its number (SLURM_NODEID) and its host (SLURMD_NODENAME)."""
        task = f"{self._settings.setup}\nexport STARFLOW_NODE_RANK=$SLURM_NODEID STARFLOW_ADDRESS=$SLURMD_NODENAME\n"
        task += f"exec {shlex.join(launch.command)}"
        return f"""\
#!/bin/bash
{self._directives(launch)}
set -u
{exports(place_variables(launch))}# A re-queued job is a new launch: nothing that the one before announced counts.
export STARFLOW_LAUNCH="$STARFLOW_LAUNCH.${{SLURM_RESTART_COUNT:-0}}"

# Before the time limit and at a preemption: every supervisor saves and leaves with status {PREEMPTED_STATUS}.
trap 'interrupted=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1 TERM

# shellcheck disable=SC2016 # each task's own variables
srun --no-kill --kill-on-bad-exit=0 --wait=0 bash -c {shlex.quote(task.strip())} &
steps=$!
interrupted=1
while [ "$interrupted" -eq 1 ]; do # a signal ends the wait, not the supervisors; bash keeps their status meanwhile
  interrupted=0
  status=0
  wait "$steps" || status=$?
done
retry=0
[ "$status" -ne {PREEMPTED_STATUS} ] || retry=1
# The store gave no answer: worth another try, but not for ever.
[ "$status" -ne {UNAVAILABLE_STATUS} ] || [ "${{SLURM_RESTART_COUNT:-0}}" -ge {MOST_RESTARTS} ] || retry=1
if [ "$retry" -eq 1 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""

    def submit(self, launch: Launch) -> dict[str, Any]:
        answer = call(["sbatch", "--parsable"], self.render(launch))
        job = answer.strip().partition(";")[0]  # ;CLUSTER follows on federations
        return {"job": job, "log": self._log(launch).replace("%j", job)}

    def nodes(self, launch: Launch) -> list[Node]:
        state, hosts, reason = self._look(launch)
        names = _expand(hosts) if hosts else []
        return [
            Node(
                node=node,
                host=names[node] if node < len(names) else "",
                state=state,
                detail=f"job {launch.handle['job']}{f': {reason}' if reason else ''}",
            )
            for node in range(launch.launch.nodes)
        ]

    def logs(self, launch: Launch, node: int, follow: bool) -> Iterator[str]:
        """All nodes write into one log; srun's --label is not used, so `node` chooses nothing."""
        path = Path(str(launch.handle["log"]))
        if not path.exists():
            raise NotFoundError(f"{path} is not there yet, or not on this machine; the job is {launch.handle['job']}")
        seen = 0
        while True:
            alive = follow and any(n.state in ("pending", "running") for n in self.nodes(launch))
            with path.open(encoding="utf-8", errors="replace") as log:
                log.seek(seen)
                yield from (line.rstrip("\n") for line in iter(log.readline, ""))
                seen = log.tell()
            if not alive:
                return
            self._pause()

    def stop(self, launch: Launch, force: bool) -> None:
        """A running job's supervisors get SIGTERM and find the request in the store: status 0, no re-queueing."""
        state, *_ = self._look(launch)
        job = str(launch.handle["job"])
        if state == "ended":
            return
        call(["scancel", job] if force or state == "pending" else ["scancel", "--signal=TERM", job])

    def _pause(self) -> None:
        import time

        time.sleep(2.0)

    def _log(self, launch: Launch) -> str:
        return str((Path(self._settings.logs or ".") / f"{launch.name}-%j.log").absolute())

    def _directives(self, launch: Launch) -> str:
        chosen = self._settings
        options = {
            "job-name": launch.name,
            "nodes": launch.launch.nodes,
            "ntasks-per-node": 1,
            "cpus-per-task": chosen.cpus_per_node,
            "gpus-per-node": launch.launch.gpus_per_node or None,
            "mem": chosen.memory,
            "partition": chosen.partition,
            "account": chosen.account,
            "qos": chosen.qos,
            "time": chosen.time,
            "output": self._log(launch),
            "open-mode": "append",
            "signal": f"B:USR1@{chosen.notice}",
            "export": "ALL",
        }
        lines = [f"--{name}={value}" for name, value in options.items() if value is not None]
        return "\n".join(f"#SBATCH {line}" for line in [*lines, "--requeue", "--no-kill", *chosen.options])

    def _look(self, launch: Launch) -> tuple[NodeState, str, str]:
        """(state, hosts, reason) of the job; Slurm forgets jobs some minutes after their end."""
        job = str(launch.handle["job"])
        try:
            answer = call(["squeue", "--noheader", "--jobs", job, "--format", "%T|%N|%r"]).strip()
        except StarflowError as error:
            if "Invalid job id" in str(error):
                return "ended", "", ""
            return "unknown", "", str(error)
        if not answer:
            return "ended", "", ""
        state, hosts, reason = answer.splitlines()[0].split("|", 2)
        known: NodeState = "pending" if state in WAITING else "running" if state in WORKING else "ended"
        return known, hosts, "" if reason == "None" else reason


def _expand(hosts: str) -> list[str]:
    """The names in a Slurm host list such as gpu[1-4,7]."""
    return call(["scontrol", "show", "hostnames", hosts]).split()
