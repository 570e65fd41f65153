"""What every launcher shares: what is to be launched, what has been, and how launchers are told apart."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Protocol, TypeVar

from pydantic import Field, ValidationError

from starflow.config import Config, load_config
from starflow.errors import ConfigError
from starflow.objectstore import open_store
from training.config import TrainConfig

Target = Literal["local", "ssh", "slurm", "kubernetes", "ray"]
NodeState = Literal["pending", "running", "ended", "unknown"]

#: Variables of this shell that a run needs elsewhere: credentials and settings of S3, Hugging Face and W&B.
PASSED = ("AWS_", "HF_", "WANDB_")


class LaunchConfig(Config):
    """Where a run is launched and on how many machines; `cluster` holds the target's own settings."""

    on: Target = Field("local", title="Target", description="What starts the machines' supervisors.")
    nodes: int = Field(1, title="Machines", ge=1, le=4096, description="Machines; on one, local starts so many of it.")
    gpus_per_node: int = Field(0, title="GPUs per machine", ge=0, le=16, description="GPUs of each; 0 for CPU ranks.")
    ranks_per_node: int | None = Field(
        None,
        title="Ranks per machine",
        ge=1,
        description="CPU ranks of each machine; else one a GPU, or the run's own.",
    )
    min_nodes: int = Field(
        1, title="Fewest machines", ge=1, description="Go on with as few as this while others stay away."
    )
    patience: int = Field(
        60, title="Patience", ge=0, description="Seconds to wait for absent machines before going on with fewer."
    )
    cluster: dict[str, Any] = Field(
        {}, title="Cluster", description="Settings of the target: hosts, partition, image, address and the like."
    )

    def ranks(self, config: TrainConfig) -> int:
        """Ranks on each machine. Raises ConfigError when the configured ranks do not divide."""
        chosen = self.ranks_per_node or self.gpus_per_node
        if not chosen and config.ranks % self.nodes:
            raise ConfigError(f"ranks {config.ranks} do not divide over {self.nodes} machines; set --ranks-per-node")
        if self.gpus_per_node and self.ranks_per_node not in (None, self.gpus_per_node):
            raise ConfigError(
                f"gpus_per_node {self.gpus_per_node} with ranks_per_node {self.ranks_per_node}: a GPU has one rank; "
                "leave ranks_per_node out"
            )
        if self.min_nodes > self.nodes:
            raise ConfigError(f"min_nodes {self.min_nodes} is more than nodes {self.nodes}; lower it")
        return chosen or config.ranks // self.nodes


class Launch(Config):
    """A launch as recorded in the store: ``runs/<run>/launches/<id>/launch.json``.

    submitted: ISO 8601, UTC. command: what each machine runs. handle: what the launcher needs to find it again.
    """

    id: str
    run: str
    store: str
    submitted: str
    launch: LaunchConfig
    ranks: int
    command: tuple[str, ...]
    handle: dict[str, Any]

    @property
    def name(self) -> str:
        """A name that DNS, Slurm and Ray accept, at most 40 characters."""
        plain = "".join(c if c.isascii() and c.isalnum() else "-" for c in self.run.lower())[:22].strip("-")
        return f"starflow-{plain or 'run'}-{self.id[-8:]}"


class Node(Config):
    """What the target says of one machine."""

    node: int
    host: str
    state: NodeState
    detail: str = ""


class Launcher(Protocol):
    """One target. Errors are StarflowErrors that name the command or address which failed."""

    def __init__(self, launch: LaunchConfig) -> None:
        """Raises ConfigError for settings that cannot be used."""

    def render(self, launch: Launch) -> str:
        """What `submit` hands over, for people to read."""
        ...

    def submit(self, launch: Launch) -> dict[str, Any]:
        """Starts the launch and returns its handle (JSON types) at once."""
        ...

    def nodes(self, launch: Launch) -> list[Node]:
        """The machines as the target knows them."""
        ...

    def logs(self, launch: Launch, node: int, follow: bool) -> Iterator[str]:
        """Lines of what a machine's supervisor and ranks printed; with `follow` until it has ended."""
        ...

    def stop(self, launch: Launch, force: bool) -> None:
        """Asks all machines to save and leave; with `force` ends them at once."""
        ...


S = TypeVar("S", bound=Config)


def settings(model: type[S], launch: LaunchConfig) -> S:
    """The target's settings. Raises ConfigError naming a wrong key or value."""
    try:
        return load_config(model, None, (), **launch.cluster)
    except ConfigError as error:
        where = f"cluster settings of {launch.on} (keys of --cluster FILE, or cluster.KEY=VALUE)"
        raise ConfigError(f"{where}: {str(error).removeprefix('configuration: ')}") from error


def with_all_ranks(config: TrainConfig, launch: LaunchConfig) -> TrainConfig:
    """The run on the launch's ranks. Raises ConfigError when the global batch does not divide over them."""
    try:
        return TrainConfig.model_validate({**config.model_dump(), "ranks": launch.nodes * launch.ranks(config)})
    except ValidationError as error:
        raise ConfigError("; ".join(item["msg"].removeprefix("Value error, ") for item in error.errors())) from error


def train_command(python: str, config_url: str) -> tuple[str, ...]:
    """What every machine runs; its place among the others is in the environment."""
    return (python, "-m", "starflow.cli", "train", "--config", config_url)


def place_variables(launch: Launch, node: int | None = None, address: str | None = None) -> dict[str, str]:
    """The environment of a machine's supervisor (see training/cluster.py), without what only the target knows."""
    known = {"STARFLOW_NODE_RANK": None if node is None else str(node), "STARFLOW_ADDRESS": address}
    return {
        "STARFLOW_LAUNCH": launch.id,
        "STARFLOW_NODES": str(launch.launch.nodes),
        "STARFLOW_MIN_NODES": str(launch.launch.min_nodes),
        "STARFLOW_PATIENCE": str(launch.launch.patience),
        "STARFLOW_GPUS": str(launch.launch.gpus_per_node),
        **{name: value for name, value in known.items() if value is not None},
    }


def passed_variables(more: tuple[str, ...] = (), environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables of this shell that go along; never written into the store or a command line."""
    return {k: v for k, v in environment.items() if k.startswith(PASSED) or k in more}


def exports(variables: Mapping[str, str]) -> str:
    """Shell lines that set the variables."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())


def default_python(target: Target) -> str:
    """This environment's Python where the target sees the same file system; the image's own on Kubernetes."""
    return "python" if target == "kubernetes" else sys.executable


def folder_key(run: str, launch: str) -> str:
    """Where a launch keeps its objects."""
    return f"runs/{run}/launches/{launch}"


def record(launch: Launch) -> None:
    """Stores what was launched, so that any machine finds it."""
    key = f"{folder_key(launch.run, launch.id)}/launch.json"
    open_store(launch.store).write(key, json.dumps(launch.model_dump(mode="json"), indent=1).encode())
