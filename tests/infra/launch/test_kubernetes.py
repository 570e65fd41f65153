"""The Job's manifest, validated against Kubernetes' own schemas, and kubectl's answers as it gives them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from infra.launch import Launch
from infra.launch.kubernetes import KubernetesLauncher
from starflow.errors import ConfigError, StarflowError

Make = Callable[..., Launch]
SETTINGS = {"image": "registry/starflow:0.1.0-cuda", "secret": "s3", "environment": {"AWS_REGION": "us-east-1"}}


def make(make_launch: Make, **config: Any) -> Launch:
    return make_launch(in_store="s3://bucket/prefix", on="kubernetes", nodes=3, cluster=SETTINGS, **config)


@pytest.mark.parametrize("gpus", [0, 8])
def test_manifests_are_valid(make_launch: Make, gpus: int) -> None:
    launch = make(make_launch, gpus_per_node=gpus)
    documents = list(yaml.safe_load_all(KubernetesLauncher(launch.launch).render(launch)))
    assert [document["kind"] for document in documents] == ["Service", "Job"]
    for document in documents:
        kubernetes_validate.validate(document, "1.34", strict=True)
    job = documents[1]["spec"]
    assert (job["completions"], job["parallelism"], job["completionMode"]) == (3, 3, "Indexed")
    limits = job["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits.get("nvidia.com/gpu") == (gpus or None)
    assert documents[0]["spec"]["selector"].items() <= job["template"]["metadata"]["labels"].items()
    actions = [rule["action"] for rule in job["podFailurePolicy"]["rules"]]
    assert actions == ["Ignore", "Ignore", "FailJob"]
    assert job["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"] == [75]


def test_pods_know_their_place(make_launch: Make) -> None:
    """The container's own command, run here by its own shell."""
    launch = make_launch("env", in_store="s3://b", on="kubernetes", nodes=3, cluster=SETTINGS)
    container = KubernetesLauncher(launch.launch).job(launch)["spec"]["template"]["spec"]["containers"][0]
    given = {variable["name"]: variable["value"] for variable in container["env"]}
    environment = {"PATH": os.environ["PATH"], "JOB_COMPLETION_INDEX": "2", **given}
    said = subprocess.run(container["command"], env=environment, capture_output=True, text=True, check=True).stdout
    assert {
        "STARFLOW_NODE_RANK=2",
        "STARFLOW_NODES=3",
        "STARFLOW_ADDRESS=starflow-my-run-0123abcd-2.starflow-my-run-0123abcd",
        "STARFLOW_LAUNCH=20260102T030405-0123abcd",
        "AWS_REGION=us-east-1",
    } <= set(said.splitlines())


def test_a_folder_is_no_store_for_pods(make_launch: Make) -> None:
    launch = make_launch(in_store="/data", on="kubernetes", cluster=SETTINGS)
    with pytest.raises(ConfigError, match="/data is a folder, which pods do not see"):
        KubernetesLauncher(launch.launch).submit(launch)
    with pytest.raises(ConfigError, match="image is missing"):
        KubernetesLauncher(make_launch(on="kubernetes").launch)


def pod(index: int, phase: str, created: str = "2026-01-02T03:04:05Z", **status: Any) -> dict[str, Any]:
    return {
        "metadata": {
            "name": f"job-{index}-xyz",
            "creationTimestamp": created,
            "annotations": {"batch.kubernetes.io/job-completion-index": str(index)},
        },
        "spec": {"nodeName": f"node{index}"},
        "status": {"phase": phase, **status},
    }


def test_submit_status_logs_stop(make_launch: Make, fake: Any, tmp_path: Path) -> None:
    fake(
        "kubectl",
        "verb = ARGV[2]\n"
        "if verb == 'apply': (HERE / 'applied').write_text(sys.stdin.read())\n"
        "if verb == 'get': print((HERE / ARGV[3]).read_text())\n"
        "if verb == 'logs': print('one\\ntwo')",
    )
    launch = make(make_launch)
    launcher = KubernetesLauncher(launch.launch)
    launch = launch.model_copy(update={"handle": launcher.submit(launch)})
    assert (tmp_path / "applied").read_text() == launcher.render(launch)

    waiting = {"containerStatuses": [{"state": {"waiting": {"reason": "ImagePullBackOff"}}}]}
    ended = {"containerStatuses": [{"state": {"terminated": {"exitCode": 75}}}]}
    pods = [
        pod(0, "Running"),
        pod(1, "Pending", **waiting),
        pod(2, "Failed", **ended),
        pod(0, "Failed", "2026-01-01T00:00:00Z"),
    ]
    (tmp_path / "pods").write_text(json.dumps({"items": pods}))
    (tmp_path / "job").write_text(json.dumps({"status": {}}))
    nodes = launcher.nodes(launch)
    assert [(node.state, node.host) for node in nodes] == [
        ("running", "node0"),
        ("pending", "node1"),
        ("pending", "node2"),
    ]
    assert [node.detail for node in nodes[1:]] == ["pod job-1-xyz: ImagePullBackOff", "pod job-2-xyz: exit status 75"]
    (tmp_path / "job").write_text(json.dumps({"status": {"conditions": [{"type": "Failed", "status": "True"}]}}))
    assert launcher.nodes(launch)[2].state == "ended"
    assert list(launcher.logs(launch, 1, follow=False)) == ["one", "two"]

    launcher.stop(launch, force=False)
    (tmp_path / "pods").write_text(json.dumps({"items": []}))
    (tmp_path / "job").write_text("")
    assert {node.state for node in launcher.nodes(launch)} == {"ended"}
    calls = [json.loads(line) for line in (tmp_path / "kubectl.calls").read_text().splitlines()]
    deleted = next(call for call in calls if "delete" in call)
    assert deleted[:5] == ["--namespace", "starflow", "delete", f"job/{launch.name}", f"service/{launch.name}"]


def test_logs_that_cannot_be_read_are_one_sentence(
    make_launch: Make, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake("kubectl", "print('one', flush=True); sys.exit('Error from server: the pod is gone')")
    launch = make(make_launch)
    read: list[str] = []
    with pytest.raises(StarflowError, match=r"kubectl .* logs .* failed: Error from server: the pod is gone"):
        read.extend(KubernetesLauncher(launch.launch).logs(launch, 0, follow=False))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(StarflowError, match="kubectl is not installed here"):
        list(KubernetesLauncher(launch.launch).logs(launch, 0, follow=False))
