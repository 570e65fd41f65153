"""`starflow cluster render`: every file of a cluster from its settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from infra.cluster.kubernetes import manifests
from infra.cluster.pods import ACCOUNTS, DATABASE_SECRET, PREFECT_PORT, RAY_SECRET
from infra.cluster.ray import aws_cluster, ray_cluster, refresh_job
from infra.cluster.settings import ClusterSettings, NodeGroup
from infra.launch.api import launcher
from infra.launch.common import Launch, LaunchConfig, Target, folder_key, train_command
from starflow.config import load_config
from training.config import TrainConfig

HERE = Path(__file__).parent
HEAD = "# Written by `starflow cluster render`: change the settings file and render again.\n"


def render(settings: ClusterSettings, out: Path) -> list[Path]:
    """Writes all files under `out`, over those of an earlier rendering; returns their paths, sorted."""
    files = {
        "kubernetes/10-prefect.yaml": _yaml(manifests(settings)),
        "kubernetes/20-ray-cluster.yaml": _yaml([ray_cluster(settings)]),
        "kubernetes/30-refresh-job.yaml": _yaml(refresh_job(settings)),
        **({"ray-aws.yaml": _yaml([aws_cluster(settings, settings.ray)])} if settings.ray else {}),
        "terraform/terraform.tfvars.json": json.dumps(terraform_variables(settings), indent=2) + "\n",
        "refresh.yaml": _yaml([settings.refresh_settings()]),
        "train.yaml": _yaml([settings.training_settings()]),
        "launch.yaml": _yaml([settings.launch_settings()]),
        "preview/training-job.yaml": HEAD + training_preview(settings, "kubernetes", settings.launch_settings()),
        "preview/train.sbatch": training_preview(settings, "slurm", {"python": "python", **settings.slurm}),
        "NEXT.md": _next(settings),
    }
    for name, text in files.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    copied = [
        *_copy((HERE / "terraform").glob("*.tf"), out / "terraform"),
        *_copy((HERE.parent / "images").glob("Dockerfile.*"), out / "images"),
    ]
    return sorted([*(out / name for name in files), *copied])


def training_preview(settings: ClusterSettings, on: Target, cluster: dict[str, Any]) -> str:
    """What `starflow launch --on ...` would submit for the run of the settings, under a launch that never was."""
    config = TrainConfig.model_validate(settings.training_settings())
    group = settings.train
    place = load_config(LaunchConfig, None, on=on, cluster=cluster, nodes=group.nodes, gpus_per_node=group.gpus)
    launch = Launch(
        id="00000000T000000-preview",
        run=config.run,
        store=config.store,
        submitted="",
        launch=place,
        ranks=config.ranks,
        command=train_command("python", f"{config.store}/{folder_key(config.run, 'LAUNCH')}/config.json"),
        handle={},
    )
    return launcher(place).render(launch)


def terraform_variables(settings: ClusterSettings) -> dict[str, Any]:
    """Values of infra/cluster/terraform/variables.tf."""
    groups = {"services": settings.services, "encode": settings.encode, "train": settings.train}
    return {
        "name": settings.name,
        "account": settings.account,
        "region": settings.region,
        "zones": [settings.region + zone for zone in settings.zones],
        "bucket": settings.bucket,
        "prefix": settings.prefix,
        "namespace": settings.namespace,
        "service_accounts": list(ACCOUNTS),
        "kubernetes_version": settings.kubernetes_version,
        "api_networks": list(settings.api_networks),
        "retention_days": settings.retention_days,
        "groups": {name: _group(group, always=name == "services") for name, group in groups.items()},
    }


def _group(group: NodeGroup, always: bool) -> dict[str, Any]:
    return {
        "instance": group.instance,
        "minimum": group.nodes if always else 0,
        "maximum": group.nodes,
        "gpus": group.gpus,
        "disk_gib": group.disk_gib,
        "spot": group.spot,
    }


def _yaml(documents: Sequence[dict[str, Any]]) -> str:
    return HEAD + yaml.safe_dump_all(json.loads(json.dumps(documents)), sort_keys=False)


def _copy(files: Any, folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    return [Path(shutil.copy(file, folder / file.name)) for file in sorted(files)]


def _next(settings: ClusterSettings) -> str:
    """What to type, in order."""
    space = settings.namespace
    secrets = "\n".join(
        f"openssl rand -hex 24 | tr -d '\\n' | "  # never on a command line, which all users of the machine see
        f"kubectl -n {space} create secret generic {name} --from-file={key}=/dev/stdin"
        for name, key in ((DATABASE_SECRET, "password"), (RAY_SECRET, "auth_token"))
    )
    scale = "\n".join(
        f"aws eks update-nodegroup-config --region {settings.region} --cluster-name {settings.name} "
        f"--nodegroup-name {name} --scaling-config desiredSize={group.nodes}"
        for name, group in (("encode", settings.encode), ("train", settings.train))
    )
    login = f"{settings.registry_login}\n" if settings.registry_login else ""
    return f"""# From these files to a running cluster

Images, from the root of the checkout:

```sh
docker build -f infra/images/Dockerfile.cpu -t {settings.cpu_image} .
docker build -f infra/images/Dockerfile.cuda -t {settings.cuda_image} .
{login}docker push {settings.cpu_image}
docker push {settings.cuda_image}
```

Network, bucket, roles, Kubernetes:

```sh
terraform -chdir=terraform init
terraform -chdir=terraform apply
aws eks update-kubeconfig --region {settings.region} --name {settings.name}
```

Add-ons that are not ours: GPUs for pods, and Ray (its operator goes into the namespace, which nothing outside reaches):

```sh
kubectl create namespace {space}
helm install gpu nvidia-device-plugin --repo https://nvidia.github.io/k8s-device-plugin -n kube-system
helm install kuberay kuberay-operator --repo https://ray-project.github.io/kuberay-helm --version 1.6.2 -n {space}
```

Secrets, then Prefect and Ray:

```sh
{secrets}
kubectl apply -f kubernetes/10-prefect.yaml
kubectl apply -f kubernetes/20-ray-cluster.yaml
kubectl -n {space} port-forward service/prefect-server {PREFECT_PORT}:{PREFECT_PORT}   # http://localhost:{PREFECT_PORT}
```

One refresh without Prefect (after a failure, delete the job and apply it again: it resumes):

```sh
kubectl apply -f kubernetes/30-refresh-job.yaml
```

Ray without Kubernetes, instead: render once more, with the network that Terraform has made (`../my-cluster.yaml` is
your settings file; as its key `ray` the network stays). The token that all nodes ask for is made in your home.

```sh
starflow cluster render --settings ../my-cluster.yaml --out . ray="$(terraform -chdir=terraform output -json ray)"
ray get-auth-token --generate > /dev/null
ray up ray-aws.yaml
```

Machines that encode and train begin at none, and what needs them waits. An autoscaler brings them, or you do, and take
them away afterwards (`desiredSize=0`):

```sh
{scale}
```

Training; `preview/` holds what such a launch submits, `--dry-run` shows that of yours:

```sh
starflow launch --on kubernetes --nodes {settings.train.nodes} --gpus-per-node {settings.train.gpus} \\
    --config train.yaml --cluster launch.yaml
```
"""
