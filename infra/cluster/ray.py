"""Ray: a KubeRay cluster that flows encode on, a job of its own for one refresh, and Ray's own AWS launcher."""

from __future__ import annotations

import importlib.metadata
import json
from typing import Any

from infra.cluster.kubernetes import RAY_CLUSTER, Manifest, metadata
from infra.cluster.pods import HOME, RAY_ACCOUNT, RAY_SECRET, environment, group_container, pod, scratch
from infra.cluster.settings import ClusterSettings, NodeGroup, RayNetwork

REFRESH_FILE = "/etc/starflow/refresh.json"
#: Idle Ray workers leave after so long; loading a VAE takes about a minute.
IDLE_SECONDS = 300


def cluster_spec(settings: ClusterSettings, **head: Any) -> dict[str, Any]:
    """RayClusterSpec of KubeRay: a head that does no work, and encode workers between none and all."""
    volume, mount = scratch("shm", "/dev/shm", "4Gi")
    env = environment(settings)
    mounts, volumes = [mount, *head.get("volumeMounts", [])], [volume, *head.get("volumes", [])]
    head_container = group_container(settings, "ray-head", settings.services, env=env, volumeMounts=mounts)
    worker = group_container(settings, "ray-worker", settings.encode, env=env, volumeMounts=[mount])
    return {
        "rayVersion": importlib.metadata.version("ray"),
        "authOptions": {"mode": "token", "secretName": RAY_SECRET},  # KubeRay 1.6 and later
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {"idleTimeoutSeconds": IDLE_SECONDS, "upscalingMode": "Default"},
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0"},
            "template": {"spec": pod([head_container], "services", volumes=volumes, serviceAccountName=RAY_ACCOUNT)},
        },
        "workerGroupSpecs": [
            {
                "groupName": "encode",
                "replicas": 0,
                "minReplicas": 0,
                "maxReplicas": settings.encode.nodes,
                "rayStartParams": {},
                "template": {"spec": pod([worker], "encode", volumes=[volume])},
            }
        ],
    }


def ray_cluster(settings: ClusterSettings) -> Manifest:
    """The cluster that the Prefect worker joins."""
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": metadata(settings, RAY_CLUSTER),
        "spec": cluster_spec(settings),
    }


def refresh_job(settings: ClusterSettings) -> list[Manifest]:
    """One refresh on a cluster of its own, which goes when it ends. Applying it again resumes."""
    config = {"refresh.json": json.dumps(settings.refresh_settings(), indent=1)}
    volume = {"name": "refresh", "configMap": {"name": "starflow-refresh"}}
    mount = {"name": "refresh", "mountPath": "/etc/starflow", "readOnly": True}
    return [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": metadata(settings, "starflow-refresh"),
            "data": config,
        },
        {
            "apiVersion": "ray.io/v1",
            "kind": "RayJob",
            "metadata": metadata(settings, "starflow-refresh"),
            "spec": {
                "entrypoint": f"starflow refresh --config {REFRESH_FILE} --json",
                "shutdownAfterJobFinishes": True,
                "ttlSecondsAfterFinished": 600,
                "backoffLimit": 2,
                "submissionMode": "K8sJobMode",
                "rayClusterSpec": cluster_spec(settings, volumes=[volume], volumeMounts=[mount]),
            },
        },
    ]


def aws_cluster(settings: ClusterSettings, network: RayNetwork) -> dict[str, Any]:
    """`ray up` file for a cluster on EC2 without Kubernetes: the same image in Docker on every node.

    Network, roles and instance profiles are those of terraform/ray.tf. All nodes ask for the token that
    `ray get-auth-token --generate` has made on the machine which runs `ray up`.
    """
    head, worker = settings.services, settings.encode
    variables = {"AWS_REGION": settings.region, "STARFLOW_STORE": settings.store, "RAY_AUTH_MODE": "token"}
    start = "ulimit -n 65536; ray start"
    return {
        "cluster_name": settings.name,
        "max_workers": worker.nodes,
        "idle_timeout_minutes": IDLE_SECONDS // 60,
        "provider": {
            "type": "aws",
            "region": settings.region,
            "availability_zone": ",".join(settings.region + zone for zone in settings.zones),
            "cache_stopped_nodes": False,
        },
        "auth": {"ssh_user": "ubuntu"},
        "docker": {
            "container_name": "starflow",
            "head_image": settings.cpu_image,
            "worker_image": settings.image_for(worker),
            "pull_before_run": True,
            "run_options": [*(f"--env {name}={value}" for name, value in variables.items()), "--shm-size=4g"],
        },
        "file_mounts": {f"{HOME}/.ray/auth_token": "~/.ray/auth_token"},
        "initialization_commands": [settings.registry_login] if settings.registry_login else [],
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 0}, "node_config": _node(settings, head, network, "head"), "max_workers": 0},
            "encode": {
                "resources": {"CPU": worker.cpus, "GPU": worker.gpus} if worker.gpus else {"CPU": worker.cpus},
                "node_config": _node(settings, worker, network, "worker"),
                "min_workers": 0,
                "max_workers": worker.nodes,
            },
        },
        "head_start_ray_commands": [
            "ray stop",
            f"{start} --head --port=6379 --num-cpus=0 --autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": ["ray stop", f"{start} --address=$RAY_HEAD_IP:6379"],
    }


def _node(settings: ClusterSettings, group: NodeGroup, network: RayNetwork, role: str) -> dict[str, Any]:
    """EC2's description of an instance: its own role, encrypted disk, metadata by session token only."""
    profile = f"arn:aws:iam::{settings.account}:instance-profile/{settings.name}-ray-{role}"
    disk = {"VolumeSize": group.disk_gib, "VolumeType": "gp3", "Encrypted": True, "DeleteOnTermination": True}
    return {
        "InstanceType": group.instance,
        "IamInstanceProfile": {"Arn": profile},
        "SubnetIds": list(network.subnets),
        "SecurityGroupIds": [network.security_group],
        "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 2},
        "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": disk}],
        **({"InstanceMarketOptions": {"MarketType": "spot"}} if group.spot and role == "worker" else {}),
    }
