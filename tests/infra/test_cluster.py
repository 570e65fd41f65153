"""What `starflow cluster render` writes, checked by the validators of those who read it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hcl2
import jsonschema
import kubernetes_validate
import pytest
import yaml

from infra.cluster.render import render
from infra.cluster.settings import ClusterSettings
from pipelines.config import RefreshConfig
from starflow.config import load_config
from starflow.errors import ConfigError
from training.config import TrainConfig

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "infra" / "cluster.yaml"
#: The fields that KubeRay 1.6 knows, from its API reference; pods inside are checked as pods.
RAY_JOB = {"entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit", "submissionMode",
           "rayClusterSpec"}  # fmt: skip
RAY_CLUSTER = {"rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec",
               "workerGroupSpecs"}  # fmt: skip
HEAD_GROUP = {"rayStartParams", "template"}
WORKER_GROUP = HEAD_GROUP | {"groupName", "replicas", "minReplicas", "maxReplicas"}


@pytest.fixture(scope="module")
def settings() -> ClusterSettings:
    return load_config(ClusterSettings, EXAMPLE)


@pytest.fixture(scope="module")
def out(settings: ClusterSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cluster")
    files = render(settings, folder)
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == files
    return folder


@pytest.fixture(scope="module")
def manifests(out: Path) -> list[dict[str, Any]]:
    files = sorted((out / "kubernetes").glob("*.yaml"))
    return [manifest for file in files for manifest in yaml.safe_load_all(file.read_text())]


def ray_clusters(manifests: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for manifest in manifests:
        if manifest["kind"] == "RayCluster":
            yield manifest["spec"]
        if manifest["kind"] == "RayJob":
            yield manifest["spec"]["rayClusterSpec"]


def pod_specs(manifests: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for manifest in manifests:
        if "template" in manifest.get("spec", {}):
            yield manifest["spec"]["template"]["spec"]
    for cluster in ray_clusters(manifests):
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            yield group["template"]["spec"]


def test_manifests_are_valid_kubernetes(manifests: list[dict[str, Any]], settings: ClusterSettings) -> None:
    for manifest in manifests:
        if not manifest["apiVersion"].startswith("ray.io/"):
            kubernetes_validate.validate(manifest, settings.kubernetes_version, strict=True)
    for spec in pod_specs(manifests):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}
        kubernetes_validate.validate(pod, settings.kubernetes_version, strict=True)


def test_the_validator_sees_a_wrong_field(manifests: list[dict[str, Any]]) -> None:
    broken = json.loads(json.dumps(next(each for each in manifests if each["kind"] == "Deployment")))
    broken["spec"]["replica"] = broken["spec"].pop("replicas")
    with pytest.raises(kubernetes_validate.ValidationError, match="replica"):
        kubernetes_validate.validate(broken, "1.34", strict=True)


def test_ray_resources_use_fields_that_kuberay_knows(manifests: list[dict[str, Any]]) -> None:
    jobs = [manifest for manifest in manifests if manifest["kind"] == "RayJob"]
    assert [job["apiVersion"] for job in jobs] == ["ray.io/v1"]
    assert set(jobs[0]["spec"]) <= RAY_JOB
    for cluster in ray_clusters(manifests):
        assert set(cluster) <= RAY_CLUSTER
        assert set(cluster["headGroupSpec"]) <= HEAD_GROUP
        assert all(isinstance(value, str) for value in cluster["headGroupSpec"]["rayStartParams"].values())
        for group in cluster["workerGroupSpecs"]:
            assert set(group) <= WORKER_GROUP
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_manifests_refer_to_things_that_exist(manifests: list[dict[str, Any]], out: Path) -> None:
    by_kind: dict[str, set[str]] = {}
    for manifest in manifests:
        by_kind.setdefault(manifest["kind"], set()).add(manifest["metadata"]["name"])
        if manifest["kind"] != "Namespace":
            assert manifest["metadata"]["namespace"] == "starflow"
    secrets = set(re.findall(r"create secret generic (\S+)", (out / "NEXT.md").read_text()))
    labels = [
        m["spec"]["template"]["metadata"]["labels"] for m in manifests if m["kind"] in ("Deployment", "StatefulSet")
    ]
    for manifest in manifests:
        if manifest["kind"] == "Service":
            assert any(manifest["spec"]["selector"].items() <= each.items() for each in labels)
    for spec in pod_specs(manifests):
        assert spec["serviceAccountName"] in by_kind["ServiceAccount"]
        volumes = {volume["name"] for volume in spec.get("volumes", [])} | {"data"}
        for volume in spec.get("volumes", []):
            assert "configMap" not in volume or volume["configMap"]["name"] in by_kind["ConfigMap"]
        for container in spec["containers"]:
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes
            for variable in container["env"]:
                reference = variable.get("valueFrom", {}).get("secretKeyRef")
                assert reference is None or reference["name"] in secrets
    for cluster in ray_clusters(manifests):
        assert cluster["authOptions"]["secretName"] in secrets


def test_nothing_runs_as_root_or_asks_for_no_memory(manifests: list[dict[str, Any]]) -> None:
    specs = list(pod_specs(manifests))
    assert len(specs) == 8  # database, server, bootstrap, worker, and a head and workers of two Ray clusters
    for spec in specs:
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["runAsUser"] >= 999
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert set(container["resources"]["requests"]) >= {"cpu", "memory"}
            assert ":" in container["image"]
            assert not container["image"].endswith(":latest")


def test_secrets_are_never_written(out: Path) -> None:
    for file in out.rglob("*"):
        assert not file.is_file() or "AWS_SECRET_ACCESS_KEY" not in file.read_text()
    kinds = {m["kind"] for file in (out / "kubernetes").glob("*") for m in yaml.safe_load_all(file.read_text())}
    assert "Secret" not in kinds


def test_the_ray_cluster_file_passes_rays_own_schema(out: Path) -> None:
    import ray.autoscaler._private.util as ray_util

    cluster = yaml.safe_load((out / "ray-aws.yaml").read_text())
    schema = json.loads((Path(ray_util.__file__).parent.parent / "ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)
    ray_util.validate_config(ray_util.fillout_defaults(cluster))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(cluster | {"max_worker": 1}, schema)


def test_jobs_get_complete_settings(out: Path, manifests: list[dict[str, Any]], settings: ClusterSettings) -> None:
    refresh = load_config(RefreshConfig, out / "refresh.yaml")
    assert refresh.store == settings.store
    assert refresh.ray_address == "auto"
    assert refresh.actors == settings.encode.nodes
    config = next(manifest for manifest in manifests if manifest["kind"] == "ConfigMap")
    assert RefreshConfig.model_validate_json(config["data"]["refresh.json"]) == refresh
    train = load_config(TrainConfig, out / "train.yaml")
    assert train.ranks == settings.train.nodes * settings.train.gpus


def test_the_training_job_and_its_script_are_what_the_launcher_submits(out: Path, settings: ClusterSettings) -> None:
    documents = list(yaml.safe_load_all((out / "preview" / "training-job.yaml").read_text()))
    assert [document["kind"] for document in documents] == ["Service", "Job"]
    for document in documents:
        kubernetes_validate.validate(document, settings.kubernetes_version, strict=True)
    job = documents[1]["spec"]
    assert job["completions"] == job["parallelism"] == settings.train.nodes
    container = job["template"]["spec"]["containers"][0]
    assert container["image"] == settings.cuda_image
    assert container["resources"]["limits"]["nvidia.com/gpu"] == settings.train.gpus
    shellcheck = Path(sys.executable).parent / "shellcheck"
    command = [shellcheck, "--severity=warning", out / "preview" / "train.sbatch"]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_dockerfiles_pass_hadolint(out: Path) -> None:
    files = [str(file) for file in sorted((out / "images").iterdir())]
    assert len(files) == 2
    result = subprocess.run([Path(sys.executable).parent / "hadolint", *files], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    for file in files:
        text = Path(file).read_text()
        assert len(re.findall(r"^FROM \S+:[\d.]+", text, re.M)) == 2, "two stages of fixed versions"
        assert text.rindex("USER 10001") > text.rindex("FROM ")


def terraform(folder: Path) -> str:
    """All of it without comments; each file parses."""
    texts = []
    for file in sorted(folder.glob("*.tf")):
        text = file.read_text()
        assert hcl2.loads(text), file.name
        texts.append(re.sub(r"(^|\s)#.*", "", text))
    return "\n".join(texts)


def test_terraform_parses_and_refers_only_to_what_it_declares(out: Path) -> None:
    text = terraform(out / "terraform")
    declared = {f"{kind}.{name}" for kind, name in re.findall(r'^resource "(\w+)" "(\w+)"', text, re.M)}
    declared |= {f"data.{kind}.{name}" for kind, name in re.findall(r'^data "(\w+)" "(\w+)"', text, re.M)}
    used = set(re.findall(r"(?<![\w.])((?:data\.)?(?:aws|tls)_\w+\.\w+)", text))
    assert used - declared == set()
    assert len(declared) > 30
    variables = set(re.findall(r'^variable "(\w+)"', text, re.M))
    assert set(re.findall(r"(?<![\w.])var\.(\w+)", text)) == variables
    assert set(re.findall(r"(?<![\w.])local\.(\w+)", text)) == {"issuer"}
    values = json.loads((out / "terraform" / "terraform.tfvars.json").read_text())
    assert set(values) == variables
    fields = set(re.findall(r"^    (\w+) += (?:string|number|bool)$", text, re.M))
    assert all(set(group) == fields for group in values["groups"].values())


def test_terraform_is_private_encrypted_and_least_privileged(out: Path) -> None:
    text = terraform(out / "terraform")
    for guard in ("block_public_acls", "block_public_policy", "ignore_public_acls", "restrict_public_buckets"):
        assert re.search(rf"{guard}\s+= true", text)
    assert 'sse_algorithm     = "aws:kms"' in text
    assert "abort_incomplete_multipart_upload" in text
    for policy in re.findall(r'data "aws_iam_policy_document" "work" \{.*?^\}', text, re.M | re.S):
        assert not re.search(r'"\*"|:\*"', policy), "the work role may use its bucket and its key, nothing else"
        assert "s3:DeleteBucket" not in policy
    assert not re.search(r'"0\.0\.0\.0/0"', re.sub(r"route \{.*?\}", "", text, flags=re.S)), "no open ingress"


def test_what_to_type_is_a_valid_shell_script(out: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"```sh\n(.*?)```", (out / "NEXT.md").read_text(), re.S)
    script = tmp_path / "next.sh"
    script.write_text("#!/bin/sh\n" + "".join(blocks))
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    assert shellcheck
    result = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("api_networks=[0.0.0.0/0]", "whole world"),
        ("account=12", "account"),
        ("bucket=Upper_Case", "bucket"),
        ("nodes=3", "unknown key nodes"),
        ("training={ranks: 7}", "does not divide"),
        ("refresh={image_siz: 3}", "image_siz"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(ClusterSettings, EXAMPLE, [override])
