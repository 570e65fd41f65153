"""JSON schemas of KubeRay's resources, as far as they are KubeRay's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

STRING, NUMBER, FLAG, ANY = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}, {}
STRINGS = {"type": "object", "additionalProperties": STRING}


def fields(required: Sequence[str] = (), **properties: Any) -> dict[str, Any]:
    """JSON schema of an object that has these fields and no others."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


#: KubeRay 1.6.2's RayClusterSpec and RayJobSpec as its API reference gives them (ray-project/kuberay,
#: docs/reference/api.md, checked against ray-operator/apis/ray/v1). ANY: Kubernetes' own; pods are checked as pods.
AUTH = fields(enableK8sTokenAuth=FLAG, secretName=STRING, mode={"enum": ["disabled", "token"]})
AUTOSCALER = fields(
    resources=ANY, image=STRING, imagePullPolicy=STRING, securityContext=ANY, idleTimeoutSeconds=NUMBER,
    upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]}, version={"enum": ["v1", "v2"]},
    env=ANY, envFrom=ANY, volumeMounts=ANY,
)  # fmt: skip
HEAD_GROUP = fields(
    ["template"], template=ANY, headService=ANY, enableIngress=FLAG, resources=STRINGS, labels=STRINGS,
    rayStartParams=STRINGS, serviceType=STRING,
)  # fmt: skip
WORKER_GROUP = fields(
    ["groupName", "maxReplicas", "minReplicas", "template"], suspend=FLAG, groupName=STRING, replicas=NUMBER,
    minReplicas=NUMBER, maxReplicas=NUMBER, idleTimeoutSeconds=NUMBER, resources=STRINGS, labels=STRINGS,
    rayStartParams=STRINGS, template=ANY, scaleStrategy=ANY, numOfHosts=NUMBER,
)  # fmt: skip
RAY_CLUSTER = fields(
    ["headGroupSpec"], upgradeStrategy=ANY, authOptions=AUTH, suspend=FLAG, managedBy=STRING,
    autoscalerOptions=AUTOSCALER, headServiceAnnotations=STRINGS, enableInTreeAutoscaling=FLAG,
    gcsFaultToleranceOptions=ANY, headGroupSpec=HEAD_GROUP, rayVersion=STRING,
    workerGroupSpecs={"type": "array", "items": WORKER_GROUP},
)  # fmt: skip
RAY_JOB = fields(
    activeDeadlineSeconds=NUMBER, backoffLimit=NUMBER, rayClusterSpec=RAY_CLUSTER, submitterPodTemplate=ANY,
    metadata=STRINGS, clusterSelector=STRINGS, submitterConfig=ANY, managedBy=STRING, deletionStrategy=ANY,
    entrypoint=STRING, runtimeEnvYAML=STRING, jobId=STRING,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    entrypointResources=STRING, entrypointNumCpus={"type": "number"}, entrypointNumGpus={"type": "number"},
    ttlSecondsAfterFinished=NUMBER, preRunningDeadlineSeconds=NUMBER, shutdownAfterJobFinishes=FLAG, suspend=FLAG,
)  # fmt: skip
SCHEMAS = {
    kind: fields(["spec"], apiVersion=STRING, kind=STRING, metadata=ANY, spec=spec)
    for kind, spec in (("RayCluster", RAY_CLUSTER), ("RayJob", RAY_JOB))
}
