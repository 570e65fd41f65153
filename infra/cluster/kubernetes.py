"""Plain manifests: namespace, service account, Postgres, Prefect server, its set-up and its worker."""

from __future__ import annotations

from typing import Any

from infra.cluster.pods import (
    ACCOUNTS,
    DATABASE_SECRET,
    LAUNCH_ACCOUNT,
    PREFECT_PORT,
    container,
    environment,
    pod,
    prefect_api,
    ray_environment,
    scratch,
)
from infra.cluster.settings import ClusterSettings

POSTGRES_IMAGE, POSTGRES_USER = "postgres:18.0-bookworm", 999
#: The Ray cluster that flows encode on; KubeRay names its head service so.
RAY_CLUSTER = "starflow"
RAY_HEAD = f"{RAY_CLUSTER}-head-svc:6379"
#: Class of the database's volume; the driver's own classes do not encrypt.
STORAGE_CLASS = "starflow-encrypted"

Manifest = dict[str, Any]


def manifests(settings: ClusterSettings) -> list[Manifest]:
    """Everything but Ray and training jobs, in the order in which it is applied."""
    return [*_namespace(settings), *_database(settings), *_server(settings), _bootstrap(settings), _worker(settings)]


def metadata(settings: ClusterSettings, name: str, **labels: str) -> dict[str, Any]:
    """Name, namespace and labels."""
    return {"name": name, "namespace": settings.namespace, "labels": {"app.kubernetes.io/part-of": "starflow"} | labels}


def _namespace(settings: ClusterSettings) -> list[Manifest]:
    labels = {"pod-security.kubernetes.io/enforce": "baseline", "pod-security.kubernetes.io/warn": "restricted"}
    same: Manifest = {"from": [{"podSelector": {}}]}
    return [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": settings.namespace, "labels": labels}},
        *(_account(settings, name) for name in ACCOUNTS),
        *_launch_rights(settings),
        {  # Prefect does not ask who you are: nobody outside the namespace reaches it, or Ray
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": metadata(settings, "inside-only"),
            "spec": {"podSelector": {}, "policyTypes": ["Ingress"], "ingress": [same]},
        },
    ]


def _account(settings: ClusterSettings, name: str) -> Manifest:
    role = f"arn:aws:iam::{settings.account}:role/{settings.name}-work"
    annotations = {"annotations": {"eks.amazonaws.com/role-arn": role}}
    return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata(settings, name) | annotations}


def _launch_rights(settings: ClusterSettings) -> list[Manifest]:
    """What `starflow launch --on kubernetes` asks of kubectl, for the training that is started in Prefect."""
    group = "rbac.authorization.k8s.io"
    rules = [
        {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["get", "create", "patch", "delete"]},
        {"apiGroups": [""], "resources": ["services"], "verbs": ["get", "create", "patch", "delete"]},
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch", "delete"]},
        {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]},
    ]
    return [
        {
            "apiVersion": f"{group}/v1",
            "kind": "Role",
            "metadata": metadata(settings, LAUNCH_ACCOUNT),
            "rules": rules,
        },
        {
            "apiVersion": f"{group}/v1",
            "kind": "RoleBinding",
            "metadata": metadata(settings, LAUNCH_ACCOUNT),
            "roleRef": {"apiGroup": group, "kind": "Role", "name": LAUNCH_ACCOUNT},
            "subjects": [{"kind": "ServiceAccount", "name": LAUNCH_ACCOUNT, "namespace": settings.namespace}],
        },
    ]


def _workload(settings: ClusterSettings, kind: str, name: str, spec: dict[str, Any], **more: Any) -> Manifest:
    labels = {"app": name}
    return {
        "apiVersion": "apps/v1",
        "kind": kind,
        "metadata": metadata(settings, name, **labels),
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": spec},
            **more,
        },
    }


def _service(settings: ClusterSettings, name: str, port: int, **more: Any) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(settings, name),
        "spec": {"selector": {"app": name}, "ports": [{"port": port, "targetPort": port}], **more},
    }


def _password(name: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": DATABASE_SECRET, "key": "password"}}}


def _database(settings: ClusterSettings) -> list[Manifest]:
    data = {"name": "data", "mountPath": "/var/lib/postgresql"}
    ready = {"exec": {"command": ["pg_isready", "-U", "prefect"]}, "periodSeconds": 5}
    env = [{"name": "POSTGRES_USER", "value": "prefect"}, {"name": "POSTGRES_DB", "value": "prefect"}]
    # The folder that the image of Postgres 18 keeps its data in.
    env += [_password("POSTGRES_PASSWORD"), {"name": "PGDATA", "value": "/var/lib/postgresql/18/docker"}]
    server = container(
        "postgres",
        POSTGRES_IMAGE,
        env,
        1,
        2,
        volumeMounts=[data],
        readinessProbe=ready,
        ports=[{"containerPort": 5432}],
    )
    spec = pod([server], "services", automountServiceAccountToken=False)
    spec["securityContext"] |= {"runAsUser": POSTGRES_USER, "fsGroup": POSTGRES_USER}
    claim = {
        "metadata": {"name": "data"},
        "spec": {
            "storageClassName": STORAGE_CLASS,
            "accessModes": ["ReadWriteOnce"],
            "resources": {"requests": {"storage": f"{settings.database_gib}Gi"}},
        },
    }
    disks = {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": STORAGE_CLASS},
        "provisioner": "ebs.csi.aws.com",
        "parameters": {"type": "gp3", "encrypted": "true"},
        "volumeBindingMode": "WaitForFirstConsumer",
    }
    return [
        disks,
        _service(settings, "prefect-database", 5432, clusterIP="None"),
        _workload(settings, "StatefulSet", "prefect-database", spec, serviceName="prefect-database",
                  volumeClaimTemplates=[claim]),
    ]  # fmt: skip


def _server(settings: ClusterSettings) -> list[Manifest]:
    url = "postgresql+asyncpg://prefect:$(DATABASE_PASSWORD)@prefect-database:5432/prefect"
    # A password comes before the variable that holds it, or Kubernetes does not put it in.
    own = {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": url,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_UI_V2_ENABLED": "false",
        # The address that the browser uses: that of the port-forward in the notes.
        "PREFECT_UI_API_URL": f"http://localhost:{PREFECT_PORT}/api",
    }
    env = [_password("DATABASE_PASSWORD"), *environment(settings, **own)]
    command = ["prefect", "server", "start", "--host", "0.0.0.0", "--port", str(PREFECT_PORT)]
    probe = {"httpGet": {"path": "/api/ready", "port": PREFECT_PORT}, "periodSeconds": 10}
    server = container(
        "server", settings.cpu_image, env, 1, 2, command=command, readinessProbe=probe,
        startupProbe=probe | {"failureThreshold": 30}, ports=[{"containerPort": PREFECT_PORT}],
    )  # fmt: skip
    return [
        _service(settings, "prefect-server", PREFECT_PORT),
        _workload(settings, "Deployment", "prefect-server", pod([server], "services"), strategy={"type": "Recreate"}),
    ]


def _bootstrap(settings: ClusterSettings) -> Manifest:
    command = ["starflow", "prefect", "bootstrap", "--api-url", prefect_api(settings), "--store", settings.store]
    setup = container("bootstrap", settings.cpu_image, environment(settings), 0.5, 1, command=command)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata(settings, "prefect-bootstrap"),
        "spec": {
            "backoffLimit": 10,  # the server may take minutes to be ready
            "ttlSecondsAfterFinished": 86400,
            "template": {"spec": pod([setup], "services", restartPolicy="OnFailure")},
        },
    }


def _worker(settings: ClusterSettings) -> Manifest:
    """The worker is a Ray node that lends nothing, so flows find the cluster with ray_address=auto."""
    script = f"ray start --address={RAY_HEAD} --num-cpus=0 && exec prefect worker start --pool starflow --type process"
    env = ray_environment(settings, PREFECT_API_URL=prefect_api(settings), PREFECT_FLOWS_HEARTBEAT_FREQUENCY="30")
    volume, mount = scratch("shm", "/dev/shm", "1Gi")
    group = settings.services
    worker = container(
        "worker", settings.cpu_image, env, max(1, group.cpus - 1), max(4, group.memory_gib - 4),
        command=["sh", "-c", script], volumeMounts=[mount],
    )  # fmt: skip
    spec = pod(
        [worker], "services", volumes=[volume], terminationGracePeriodSeconds=120, serviceAccountName=LAUNCH_ACCOUNT
    )
    return _workload(settings, "Deployment", "prefect-worker", spec, strategy={"type": "Recreate"})
