"""Launching on Kubernetes: an Indexed Job with a supervisor a pod, and a headless service for their names."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import Field

from infra.launch.common import Launch, LaunchConfig, Node, NodeState, place_variables, settings
from infra.launch.tools import call, lines_of
from starflow.config import Config
from starflow.errors import ConfigError
from training.launch import PREEMPTED_STATUS

PHASES: dict[str, NodeState] = {"Pending": "pending", "Running": "running", "Succeeded": "ended", "Failed": "ended"}


class KubernetesSettings(Config):
    """What the pods are; the defaults are those of `starflow cluster render`."""

    image: str = Field(min_length=1, description="Image with this project, such as REGISTRY/starflow:0.1.0-cuda.")
    namespace: str = Field("starflow", description="Namespace.")
    service_account: str = Field("starflow", description="Service account; its role opens the bucket.")
    secret: str | None = Field(None, description="Secret whose keys become variables, such as AWS_ACCESS_KEY_ID.")
    environment: dict[str, str] = Field({}, description="More variables that are no secrets, such as AWS_REGION.")
    node_selector: dict[str, str] = Field({"starflow/group": "train"}, description="Labels of the nodes to use.")
    cpus: float = Field(8, gt=0, description="CPU cores of each pod.")
    memory_gib: float = Field(32, gt=0, description="Memory of each pod.")
    cache_gib: int = Field(200, gt=0, description="Disk of each pod for snapshot shards and checkpoints on their way.")
    shm_gib: int = Field(8, gt=0, description="Shared memory of each pod, which NCCL uses.")
    save_seconds: int = Field(120, gt=0, description="Time to save between the request to stop and the kill.")
    user: int = Field(10001, ge=0, description="User id in the container.")
    context: str | None = Field(None, description="kubectl context; the current one if left out.")
    python: str = Field("", description="Python of the environment in the image; python if left out.")


class KubernetesLauncher:
    """Pods that are disrupted or leave with the status of a preemption are replaced without counting as failures."""

    def __init__(self, launch: LaunchConfig) -> None:
        self._settings = settings(KubernetesSettings, launch)

    def render(self, launch: Launch) -> str:
        return yaml.safe_dump_all([self.service(launch), self.job(launch)], sort_keys=False)

    def submit(self, launch: Launch) -> dict[str, Any]:
        if not launch.store.startswith("s3://"):
            raise ConfigError(f"store {launch.store} is a folder, which pods do not see; use s3://BUCKET/PREFIX")
        self._kubectl("apply", "-f", "-", given=self.render(launch))
        return {"job": launch.name, "namespace": self._settings.namespace}

    def service(self, launch: Launch) -> dict[str, Any]:
        """Gives pod i the name <job>-<i>.<job>; before it is ready, since the ranks meet before that."""
        return {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": self._metadata(launch),
            "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": self._labels(launch)},
        }

    def job(self, launch: Launch) -> dict[str, Any]:
        """The Job. The index is the machine's number."""
        ignored = [
            {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            {"action": "Ignore", "onExitCodes": _codes(PREEMPTED_STATUS)},
        ]
        # 1: the run has failed for good, as its events say. A store that is away (74) costs one of the retries.
        final = [{"action": "FailJob", "onExitCodes": _codes(1)}]
        return {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": self._metadata(launch),
            "spec": {
                "completionMode": "Indexed",
                "completions": launch.launch.nodes,
                "parallelism": launch.launch.nodes,
                "backoffLimit": 4 * launch.launch.nodes,
                "podReplacementPolicy": "Failed",
                "podFailurePolicy": {"rules": [*ignored, *final]},
                "ttlSecondsAfterFinished": 86400,
                "template": {"metadata": {"labels": self._labels(launch)}, "spec": self._pod(launch)},
            },
        }

    def nodes(self, launch: Launch) -> list[Node]:
        pods = json.loads(self._kubectl("get", "pods", "--selector", _selector(launch), "--output", "json"))["items"]
        newest: dict[int, dict[str, Any]] = {}
        for pod in sorted(pods, key=lambda pod: pod["metadata"]["creationTimestamp"]):
            index = pod["metadata"].get("annotations", {}).get("batch.kubernetes.io/job-completion-index")
            if index is not None:
                newest[int(index)] = pod
        waiting: NodeState = "ended" if self._job_is_over(launch) else "pending"
        return [_node(number, newest.get(number), waiting) for number in range(launch.launch.nodes)]

    def logs(self, launch: Launch, node: int, follow: bool) -> Iterator[str]:
        labels = f"{_selector(launch)},batch.kubernetes.io/job-completion-index={node}"
        more = ["--follow"] if follow else []
        return lines_of(self._command("logs", "--selector", labels, "--tail", "-1", *more))

    def stop(self, launch: Launch, force: bool) -> None:
        """Deleting the job sends SIGTERM to every pod and kills those that have not left after `save_seconds`."""
        now = ["--grace-period=0", "--force"] if force else []
        names = [f"job/{launch.name}", f"service/{launch.name}"]
        self._kubectl("delete", *names, "--ignore-not-found", "--wait=false", *now)
        if force:
            self._kubectl("delete", "pods", "--selector", _selector(launch), "--ignore-not-found", *now)

    def _job_is_over(self, launch: Launch) -> bool:
        found = self._kubectl("get", "job", launch.name, "--ignore-not-found", "--output", "json").strip()
        if not found:
            return True
        conditions = json.loads(found).get("status", {}).get("conditions", [])
        return any(c["type"] in ("Complete", "Failed") and c["status"] == "True" for c in conditions)

    def _pod(self, launch: Launch) -> dict[str, Any]:
        chosen = self._settings
        gpus = {"nvidia.com/gpu": launch.launch.gpus_per_node} if launch.launch.gpus_per_node else {}
        memory = {"memory": f"{round(chosen.memory_gib * 1024)}Mi", **gpus}
        variables = {**place_variables(launch), "XDG_CACHE_HOME": "/cache", **chosen.environment}
        script = (
            'export STARFLOW_NODE_RANK="$JOB_COMPLETION_INDEX" '
            f'STARFLOW_ADDRESS="{launch.name}-$JOB_COMPLETION_INDEX.{launch.name}"\n'
            f"exec {shlex.join(launch.command)}"
        )
        container = {
            "name": "train",
            "image": chosen.image,
            "command": ["sh", "-c", script],
            "env": [{"name": name, "value": value} for name, value in variables.items()],
            **({"envFrom": [{"secretRef": {"name": chosen.secret}}]} if chosen.secret else {}),
            "resources": {"requests": {"cpu": f"{round(chosen.cpus * 1000)}m", **memory}, "limits": memory},
            "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
            "volumeMounts": [{"name": "cache", "mountPath": "/cache"}, {"name": "shm", "mountPath": "/dev/shm"}],
        }
        return {
            "restartPolicy": "Never",
            "subdomain": launch.name,
            "serviceAccountName": chosen.service_account,
            "terminationGracePeriodSeconds": chosen.save_seconds,
            **({"nodeSelector": chosen.node_selector} if chosen.node_selector else {}),
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
            "affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [self._apart(launch)]}},
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": chosen.user,
                "fsGroup": chosen.user,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [container],
            "volumes": [
                {"name": "cache", "emptyDir": {"sizeLimit": f"{chosen.cache_gib}Gi"}},
                {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{chosen.shm_gib}Gi"}},
            ],
        }

    def _apart(self, launch: Launch) -> dict[str, Any]:
        """Two machines of a run never share a node."""
        return {"labelSelector": {"matchLabels": self._labels(launch)}, "topologyKey": "kubernetes.io/hostname"}

    def _metadata(self, launch: Launch) -> dict[str, Any]:
        return {"name": launch.name, "namespace": self._settings.namespace, "labels": self._labels(launch)}

    def _labels(self, launch: Launch) -> dict[str, str]:
        return {"app.kubernetes.io/name": "starflow-train", "starflow/launch": launch.name}

    def _command(self, *arguments: str) -> list[str]:
        context = ["--context", self._settings.context] if self._settings.context else []
        return ["kubectl", *context, "--namespace", self._settings.namespace, *arguments]

    def _kubectl(self, *arguments: str, given: str = "") -> str:
        return call(self._command(*arguments), given)


def _selector(launch: Launch) -> str:
    return f"starflow/launch={launch.name}"


def _codes(*codes: int) -> dict[str, Any]:
    return {"containerName": "train", "operator": "In", "values": list(codes)}


def _node(number: int, pod: dict[str, Any] | None, waiting: NodeState) -> Node:
    if pod is None:
        return Node(node=number, host="", state=waiting)
    state = PHASES.get(pod["status"].get("phase", ""), "unknown")
    if state == "ended" and pod["status"].get("phase") == "Failed" and waiting == "pending":
        state = "pending"  # the job replaces it
    detail = pod["status"].get("reason", "")
    for status in pod["status"].get("containerStatuses", []):
        ended = status.get("state", {}).get("terminated")
        if ended:
            detail = f"exit status {ended['exitCode']}"
        elif status.get("state", {}).get("waiting"):
            detail = status["state"]["waiting"].get("reason", "")
    name = f"pod {pod['metadata']['name']}"
    return Node(
        node=number, host=pod["spec"].get("nodeName", ""), state=state, detail=f"{name}: {detail}" if detail else name
    )
