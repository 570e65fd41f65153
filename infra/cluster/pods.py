"""Pieces of Kubernetes pods that all manifests share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from infra.cluster.settings import ClusterSettings, NodeGroup

#: User of the images and its home; see infra/images.
USER, HOME = 10001, "/home/starflow"
#: Secrets that people create once; see the notes that are rendered beside the manifests.
DATABASE_SECRET, RAY_SECRET = "starflow-database", "starflow-ray"
#: Accounts, all of which may use the store: of most pods; of the Prefect worker, which also launches training in the
#: namespace; of Ray's heads, which KubeRay lets change the size of Ray clusters.
SERVICE_ACCOUNT, LAUNCH_ACCOUNT, RAY_ACCOUNT = ACCOUNTS = ("starflow", "starflow-launch", "starflow-ray-head")
PREFECT_PORT = 4200


def prefect_api(settings: ClusterSettings) -> str:
    """Address of the Prefect server inside the cluster."""
    return f"http://prefect-server.{settings.namespace}:{PREFECT_PORT}/api"


def environment(settings: ClusterSettings, **more: str) -> list[dict[str, Any]]:
    """Variables of every container that uses the store; credentials come from the service account's role."""
    values = {"AWS_REGION": settings.region, "STARFLOW_STORE": settings.store, "HOME": HOME, **more}
    return [{"name": name, "value": value} for name, value in values.items()]


def ray_environment(settings: ClusterSettings, **more: str) -> list[dict[str, Any]]:
    """The same for a Ray node that KubeRay does not manage: it shows the cluster's token."""
    token = {"name": RAY_SECRET, "key": "auth_token"}
    return [
        *environment(settings, RAY_AUTH_MODE="token", **more),
        {"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": token}},
    ]


def container(
    name: str,
    image: str,
    env: list[dict[str, Any]],
    cpus: float,
    memory_gib: float,
    gpus: int = 0,
    command: Sequence[str] = (),
    **more: Any,
) -> dict[str, Any]:
    """A container that may do nothing but its work: requests equal limits for memory and GPUs."""
    limits: dict[str, Any] = {"memory": f"{round(memory_gib * 1024)}Mi"}
    if gpus:
        limits["nvidia.com/gpu"] = gpus
    return {
        "name": name,
        "image": image,
        **({"command": list(command)} if command else {}),
        "env": env,
        "resources": {"requests": {"cpu": f"{round(cpus * 1000)}m", **limits}, "limits": limits},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        **more,
    }


def pod(containers: list[dict[str, Any]], group: str, **more: Any) -> dict[str, Any]:
    """A pod's spec on machines of the group, which are tainted if they have GPUs."""
    return {
        "serviceAccountName": SERVICE_ACCOUNT,
        "nodeSelector": {"starflow/group": group},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": containers,
        **more,
    }


def scratch(name: str, path: str, memory: str | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(volume, mount) of a folder that lives as long as the pod, in memory of the given size or on disk."""
    source: dict[str, Any] = {"medium": "Memory", "sizeLimit": memory} if memory else {}
    return {"name": name, "emptyDir": source}, {"name": name, "mountPath": path}


def group_container(settings: ClusterSettings, name: str, group: NodeGroup, **more: Any) -> dict[str, Any]:
    """A container with all that a machine of the group offers to pods."""
    env = more.pop("env", environment(settings))
    return container(name, settings.image_for(group), env, group.cpus, group.memory_gib, group.gpus, **more)
