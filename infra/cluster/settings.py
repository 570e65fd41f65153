"""The one file that describes a cluster; nothing else is edited by hand."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from starflow.config import Config

#: Names that Kubernetes, AWS and DNS all accept.
NAME = r"^[a-z][a-z0-9-]{1,38}[a-z0-9]$"
#: Shortest prefix of a network that may reach the cluster: no organisation works from more addresses.
WIDEST_NETWORK = 8


class NodeGroup(Config):
    """Machines of one kind."""

    instance: str = Field(pattern=r"^[a-z0-9-]+\.[a-z0-9-]+$", description="EC2 instance type.")
    nodes: int = Field(ge=1, le=4096, description="How many at most.")
    cpus: int = Field(ge=1, description="CPU cores that a pod asks for; leave some to the node.")
    memory_gib: int = Field(ge=1, description="Memory that a pod asks for.")
    gpus: int = Field(0, ge=0, le=16, description="GPUs that a pod asks for.")
    disk_gib: int = Field(200, ge=20, description="Root volume of a node: images, shards that were downloaded.")
    spot: bool = Field(False, description="Cheaper machines that may be taken away; runs resume.")


class RayNetwork(Config):
    """Where machines of `ray up` live: what `terraform output -json ray` prints."""

    subnets: tuple[str, ...] = Field(min_length=1, description="Subnets that give machines a public address.")
    security_group: str = Field(pattern=r"^sg-[0-9a-f]+$", description="Security group of all machines.")


class ClusterSettings(Config):
    """A cluster on AWS: where it is, what runs on it, how large it is."""

    name: str = Field("starflow", pattern=NAME, description="Prefix of everything that is created.")
    account: str = Field(pattern=r"^\d{12}$", description="AWS account.")
    region: str = Field("us-east-1", pattern=r"^[a-z]{2}(-[a-z]+)+-\d$", description="AWS region.")
    zones: tuple[str, ...] = Field(("a", "b"), min_length=2, description="Letters of the availability zones.")
    bucket: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$", description="S3 bucket of the store.")
    prefix: str = Field("", pattern=r"^([\w.-]+(/[\w.-]+)*)?$", description="Prefix of the store in the bucket.")
    image: str = Field(min_length=3, description="Container repository, without tag.")
    tag: str = Field("0.1.0", pattern=r"^[\w][\w.-]{0,100}$", description="Tag; -cpu and -cuda are appended.")
    namespace: str = Field("starflow", pattern=NAME, description="Kubernetes namespace.")
    kubernetes_version: str = Field("1.34", pattern=r"^1\.\d+$", description="Version of the EKS control plane.")
    api_networks: tuple[str, ...] = Field(
        description="Networks (CIDR) that may reach the Kubernetes API, and machines of `ray up` over SSH: your office "
        "or VPN, not the world."
    )
    database_gib: int = Field(20, ge=5, description="Volume of Prefect's database.")
    retention_days: int = Field(30, ge=1, description="Noncurrent object versions are kept so long.")
    services: NodeGroup = Field(description="Machines for Prefect server, database, worker and the Ray head.")
    encode: NodeGroup = Field(description="Machines that caption and encode, as Ray workers.")
    train: NodeGroup = Field(description="Machines that train.")
    ray: RayNetwork | None = Field(None, description="Network of `ray up`; without it ray-aws.yaml is not written.")
    refresh: dict[str, Any] = Field({}, description="Settings of the refresh that the RayJob runs.")
    training: dict[str, Any] = Field({}, description="Settings of the run that is trained.")
    slurm: dict[str, Any] = Field({}, description="Settings of `starflow launch --on slurm`, where there is a Slurm.")

    @field_validator("api_networks")
    @classmethod
    def _not_the_world(cls, networks: tuple[str, ...]) -> tuple[str, ...]:
        import ipaddress

        for network in networks:
            if ipaddress.IPv4Network(network).prefixlen < WIDEST_NETWORK:
                raise ValueError(f"{network} is much of the world; name the networks you work from")
        if not networks:
            raise ValueError("without a network nobody reaches the cluster; name the networks you work from")
        return networks

    @model_validator(mode="after")
    def _jobs_are_valid(self) -> ClusterSettings:
        from infra.launch.slurm import SlurmSettings
        from pipelines.config import RefreshConfig
        from training.config import TrainConfig

        RefreshConfig.model_validate(self.refresh_settings())
        TrainConfig.model_validate(self.training_settings())
        SlurmSettings.model_validate(self.slurm)
        return self

    @property
    def store(self) -> str:
        """URL of the store."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def registry_login(self) -> str | None:
        """Command that logs Docker in to the images' registry if it is Amazon's, which lets nobody in without."""
        host = self.image.partition("/")[0]
        login = f"aws ecr get-login-password --region {self.region} | docker login -u AWS --password-stdin {host}"
        return login if ".dkr.ecr." in host else None

    @property
    def cpu_image(self) -> str:
        """Image for everything without a GPU."""
        return f"{self.image}:{self.tag}-cpu"

    @property
    def cuda_image(self) -> str:
        """Image for GPUs."""
        return f"{self.image}:{self.tag}-cuda"

    def image_for(self, group: NodeGroup) -> str:
        """The image that runs on the group's machines."""
        return self.cuda_image if group.gpus else self.cpu_image

    def refresh_settings(self) -> dict[str, Any]:
        """A complete refresh: the file's settings over what follows from the cluster."""
        return {
            "urls": f"{self.store}/lists",
            "store": self.store,
            "ray_address": "auto",
            "actors": max(1, self.encode.nodes * max(1, self.encode.gpus)),
            "cpus_per_actor": max(1, self.encode.cpus // max(1, self.encode.gpus)),
            "gpus_per_actor": 1 if self.encode.gpus else 0,
            "image_size": 256,
            "vae": "stabilityai/sd-vae-ft-ema",
            "text_encoder": None,
            **self.refresh,
        }

    def training_settings(self) -> dict[str, Any]:
        """A complete training run: the file's settings over what follows from the cluster."""
        return {
            "store": self.store,
            "run": self.name,
            "preset": "t2i-256",
            "ranks": self.train.nodes * max(1, self.train.gpus),
            **self.training,
        }

    def launch_settings(self) -> dict[str, Any]:
        """Settings of `starflow launch --on kubernetes` for this cluster."""
        return {
            "image": self.image_for(self.train),
            "namespace": self.namespace,
            "environment": {"AWS_REGION": self.region},
            "node_selector": {"starflow/group": "train"},
            "cpus": self.train.cpus,
            "memory_gib": self.train.memory_gib,
            "cache_gib": max(1, self.train.disk_gib * 3 // 4),
        }
