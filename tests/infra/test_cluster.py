"""What `starflow cluster render` writes, checked by the validators of those who read it."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import re
import shlex
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
from infra.cluster.settings import ClusterSettings, RayNetwork
from infra.launch.kubernetes import KubernetesLauncher
from pipelines.config import RefreshConfig
from starflow.config import load_config
from starflow.errors import ConfigError
from tests.infra.command_lines import check_command
from tests.infra.kuberay import SCHEMAS
from training.config import TrainConfig

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "infra" / "cluster.yaml"
#: What `terraform output -json ray` prints.
RAY_NETWORK = {"subnets": ["subnet-0a1b", "subnet-0c2d"], "security_group": "sg-0e3f"}


@pytest.fixture(scope="module")
def settings() -> ClusterSettings:
    return load_config(ClusterSettings, EXAMPLE, ray=RAY_NETWORK)


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


def test_ray_resources_have_the_fields_of_kuberay(manifests: list[dict[str, Any]]) -> None:
    found = [manifest for manifest in manifests if manifest["kind"].startswith("Ray")]
    assert [(each["apiVersion"], each["kind"]) for each in found] == [
        ("ray.io/v1", "RayCluster"),
        ("ray.io/v1", "RayJob"),
    ]
    for manifest in found:
        schema = SCHEMAS[manifest["kind"]]
        jsonschema.validate(manifest, schema)
        broken = json.loads(json.dumps(manifest).replace('"idleTimeoutSeconds"', '"idleTimeout"'))
        with pytest.raises(jsonschema.ValidationError, match="idleTimeout"):
            jsonschema.validate(broken, schema)


def test_ray_resources_are_what_kuberay_s_operator_accepts(manifests: list[dict[str, Any]]) -> None:
    """The rules of ray-operator/controllers/ray/utils/validation.go that a schema does not hold."""
    for manifest in manifests:
        if manifest["kind"].startswith("Ray"):
            assert re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", manifest["metadata"]["name"])
        if manifest["kind"] == "RayJob":
            job = manifest["spec"]
            assert job["shutdownAfterJobFinishes"] or not job["ttlSecondsAfterFinished"]
            assert job["submissionMode"] != "SidecarMode" or not job["backoffLimit"]
    for cluster in ray_clusters(manifests):
        assert tuple(map(int, cluster["rayVersion"].split(".")[:2])) >= (2, 52), "token authentication needs it"
        assert cluster["rayVersion"] == importlib.metadata.version("ray"), "the version of the images"
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            assert not {"labels", "redis-password"} & set(group["rayStartParams"])
            assert "restartPolicy" not in group["template"]["spec"], "the autoscaler allows Never only"
        for group in cluster["workerGroupSpecs"]:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_manifests_refer_to_things_that_exist(manifests: list[dict[str, Any]], out: Path) -> None:
    by_kind: dict[str, set[str]] = {}
    for manifest in manifests:
        by_kind.setdefault(manifest["kind"], set()).add(manifest["metadata"]["name"])
        if manifest["kind"] not in ("Namespace", "StorageClass"):
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
    disks = next(manifest for manifest in manifests if manifest["kind"] == "StorageClass")
    assert disks["parameters"]["encrypted"] == "true"
    claims = [claim for m in manifests for claim in m.get("spec", {}).get("volumeClaimTemplates", [])]
    assert [claim["spec"]["storageClassName"] for claim in claims] == [disks["metadata"]["name"]]


def test_the_worker_may_launch_training_and_nobody_else(manifests: list[dict[str, Any]]) -> None:
    role, binding = (next(m for m in manifests if m["kind"] == kind) for kind in ("Role", "RoleBinding"))
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    account = binding["subjects"][0]["name"]
    with_it = [spec for spec in pod_specs(manifests) if spec["serviceAccountName"] == account]
    assert [spec["containers"][0]["name"] for spec in with_it] == ["worker"]
    heads = {id(cluster["headGroupSpec"]["template"]["spec"]) for cluster in ray_clusters(manifests)}
    with_theirs = {id(spec) for spec in pod_specs(manifests) if spec["serviceAccountName"] == "starflow-ray-head"}
    assert with_theirs == heads, "KubeRay gives the heads' account rights of its own"
    granted = {(thing, verb) for rule in role["rules"] for thing in rule["resources"] for verb in rule["verbs"]}
    needed = {
        "apply": {(thing, verb) for thing in ("jobs", "services") for verb in ("get", "create", "patch")},
        "get": {("pods", "list"), ("jobs", "get")},
        "delete": {("jobs", "delete"), ("services", "delete"), ("pods", "delete"), ("pods", "list")},
        "logs": {("pods", "get"), ("pods", "list"), ("pods", "watch"), ("pods/log", "get")},
    }
    used = set(re.findall(r'self\._(?:kubectl|command)\(\s*"(\w+)"', inspect.getsource(KubernetesLauncher)))
    assert used == set(needed)
    assert set().union(*needed.values()) <= granted
    assert not {thing for thing, _ in granted} & {"secrets", "*"}


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


def test_ray_on_aws_uses_what_terraform_makes(settings: ClusterSettings, out: Path) -> None:
    from ray.autoscaler.tags import TAG_RAY_CLUSTER_NAME

    cluster, text = yaml.safe_load((out / "ray-aws.yaml").read_text()), terraform(out / "terraform")
    roles = re.search(r'resource "aws_iam_role" "ray" \{\s+for_each\s+= toset\((.*?)\)\s+name\s+= "(.*?)"', text)
    assert roles
    assert 'resource "aws_iam_instance_profile" "ray" {\n  for_each = aws_iam_role.ray\n' in text
    named = roles[2].replace("${var.name}", settings.name)
    profiles = {f"instance-profile/{named.replace('${each.key}', key)}" for key in json.loads(roles[1])}
    nodes = {name: group["node_config"] for name, group in cluster["available_node_types"].items()}
    used = {name: node["IamInstanceProfile"]["Arn"].rpartition(":")[2] for name, node in nodes.items()}
    assert set(used.values()) == profiles
    assert used["head"].endswith("-head"), "only the head may start machines"
    tag = re.findall(r"(?:RequestTag|ResourceTag)/([\w-]+)", text)
    assert set(tag) == {TAG_RAY_CLUSTER_NAME}
    assert cluster["cluster_name"] == settings.name, "the value of that tag"
    for node in nodes.values():
        assert {key: node[key] for key in ("SubnetIds", "SecurityGroupIds")} == {
            "SubnetIds": RAY_NETWORK["subnets"],
            "SecurityGroupIds": [RAY_NETWORK["security_group"]],
        }
    output = re.search(r'output "ray" \{.*?value = \{(.*?)\}\n\}', text, re.S)
    assert output
    assert set(re.findall(r"(\w+) +=", output[1])) == set(RayNetwork.model_fields) == set(RAY_NETWORK)


def test_without_a_network_there_is_no_file_for_ray_up(settings: ClusterSettings, tmp_path: Path) -> None:
    files = render(settings.model_copy(update={"ray": None}), tmp_path)
    assert "ray-aws.yaml" not in {file.name for file in files}


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
        stages = re.findall(r"^FROM (.*)", text, re.M)
        assert len(stages) > 1
        assert all(re.match(r"\S+:v?\d+\.\d+\.\d+", stage) for stage in stages), "fixed versions"
        assert text.rindex("USER 10001") > text.rindex("FROM ")
    build, _, final = (out / "images" / "Dockerfile.cuda").read_text().rpartition("\nFROM ")
    wanted = [f"DS_BUILD_{operator}=1" for operator in ("FUSED_ADAM", "CPU_ADAM", "AIO")]
    assert all(build.index(each) < build.index("--no-binary deepspeed") for each in wanted), "operators are prebuilt"
    assert "g++ " in final, "torch.compile needs it while training"


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
    locals_block = re.search(r"^locals \{(.*?)^\}", text, re.M | re.S)
    assert locals_block
    assert set(re.findall(r"(?<![\w.])local\.(\w+)", text)) == set(re.findall(r"^  (\w+) =", locals_block[1], re.M))
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
    assert "noncurrent_version_expiration" in text
    policies = re.findall(r'^data "aws_iam_policy_document" "(\w+)" (\{.*?^\})', text, re.M | re.S)
    work, head = (next(body for name, body in policies if name == wanted) for wanted in ("work", "ray_head"))
    assert '[join("/", compact([aws_s3_bucket.store.arn, var.prefix, "*"]))]' in work, "only the store's prefix"
    assert re.search(r'variable = "s3:prefix"\s+values   = \["\$\{condition.value\}/\*"\]', work)
    assert not re.search(r'\["\*"\]|:\*"', work), "the work role may use its bucket and its key, nothing else"
    assert "s3:DeleteBucket" not in work
    for statement in re.findall(r"statement \{(.*?)\n  \}", head, re.S):
        assert '["*"]' not in statement or set(re.findall(r'"ec2:(\w+?)[A-Z]\w+"', statement)) == {"Describe"}
        assert '"ec2:TerminateInstances"' not in statement or "ResourceTag/ray-cluster-name" in statement
    assert 'variable = "iam:PassedToService"' in head
    for kept in ('"aws_s3_bucket" "store"', '"aws_kms_key" "store"'):
        assert re.search(rf"^resource {kept} \{{((?!^\}}).)*prevent_destroy = true", text, re.M | re.S), kept
    assert re.search(r"bootstrap_cluster_creator_admin_permissions = true", text), "or nobody may use kubectl"
    for name, body in policies:  # pods by their service account, machines by EC2: never both for one role
        assert name != "assume_work" or "ec2.amazonaws.com" not in body
    outward = r'(route|resource "aws_vpc_security_group_egress_rule" "\w+") \{.*?\}'
    assert not re.search(r'"0\.0\.0\.0/0"', re.sub(outward, "", text, flags=re.S)), "no open ingress"


def test_what_to_type_is_a_valid_shell_script(out: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"```sh\n(.*?)```", (out / "NEXT.md").read_text(), re.S)
    script = tmp_path / "next.sh"
    script.write_text("#!/bin/sh\n" + "".join(blocks))
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    assert shellcheck
    result = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_commands_in_the_files_exist_with_those_options(out: Path, manifests: list[dict[str, Any]]) -> None:
    typed = re.findall(r"```sh\n(.*?)```", (out / "NEXT.md").read_text(), re.S)
    lines = "".join(typed).replace("\\\n", " ").splitlines()
    lines += [manifest["spec"]["entrypoint"] for manifest in manifests if manifest["kind"] == "RayJob"]
    for spec in pod_specs(manifests):
        lines += [shlex.join(container.get("command", [])) for container in spec["containers"]]
    ours = [line for line in lines if line.startswith("starflow ")]
    assert {line.split()[1] for line in ours} == {"cluster", "launch", "refresh", "prefect"}
    for line in ours:
        check_command(line, "rendered")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("api_networks=[0.0.0.0/1]", "much of the world"),
        ("api_networks=['2001:db8::/32']", "2001:db8::/32"),
        ("account=12", "account"),
        ("bucket=Upper_Case", "bucket"),
        ("nodes=3", "unknown key nodes"),
        ("ray={subnets: [], security_group: sg-0}", "subnets"),
        ("training={ranks: 7}", "does not divide"),
        ("refresh={image_siz: 3}", "image_siz"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(ClusterSettings, EXAMPLE, [override])
