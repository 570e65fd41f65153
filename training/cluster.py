"""Several machines: who this one is, and how the supervisors keep in step through the store.

Launchers set on each machine:

- STARFLOW_NODES, STARFLOW_NODE_RANK: how many machines there are, and which one this is, from 0;
- STARFLOW_LAUNCH: a name that is the same on all machines and new for each launch;
- STARFLOW_ADDRESS: where the others reach this machine; its host name if left out;
- STARFLOW_MIN_NODES, STARFLOW_PATIENCE: go on with as few as this many machines, after waiting that many seconds for
  the absent ones; 1 and 60 if left out;
- STARFLOW_GPUS: GPUs that this machine must have.

Whoever holds the run's lease leads: it numbers the attempts and announces each with the machines that take part.
The others follow, and one of them takes over when the lease is free.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from starflow.config import Config
from starflow.errors import ConfigError, NotFoundError
from starflow.objectstore import ObjectStore
from training.config import TrainConfig
from training.launch import Outcome

#: Addresses that only this machine reaches.
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Place:
    """This machine among those of a launch; alone without one."""

    nodes: int = 1
    node: int = 0
    launch: str = ""
    address: str = "127.0.0.1"
    min_nodes: int = 1
    patience: float = 60.0
    gpus: int = 0

    def share(self, ranks: int) -> int:
        """Ranks on each machine. Raises ConfigError unless all machines get the same number."""
        if ranks % self.nodes:
            raise ConfigError(f"ranks {ranks} do not divide over {self.nodes} machines; change one of them")
        return ranks // self.nodes


class Announcement(Config):
    """What the leader tells the others: an attempt begins, or the run has ended.

    members: owners (see `training.processes.identity`) of the supervisors that take part, in the order of their
    ranks, the leader first. ranks: how many there are on all of them. master: host:port where they meet.
    """

    launch: str
    attempt: int
    members: tuple[str, ...] = ()
    ranks: int = 0
    master: str = ""
    outcome: Outcome | None = None

    def torchrun(self, owner: str) -> list[str]:
        """Rendezvous arguments for the machine of `owner`: a free loopback port if it is alone."""
        if len(self.members) == 1:
            return ["--standalone"]
        host, _, port = self.master.rpartition(":")
        return [
            *("--nnodes", str(len(self.members)), "--node-rank", str(self.members.index(owner))),
            *("--master-addr", host, "--master-port", port),
        ]

    @property
    def on_one_machine(self) -> bool:
        """Whether all ranks meet on the loopback interface."""
        return len(self.members) == 1 or self.master.rpartition(":")[0] in LOOPBACK


def place_from_environment(environment: Mapping[str, str] = os.environ) -> Place:
    """The place that the launcher set; a single machine without one. Raises ConfigError naming the variable."""
    nodes = _number(environment, "STARFLOW_NODES", "1")
    if nodes == 1:
        return Place(launch=environment.get("STARFLOW_LAUNCH", ""), gpus=_number(environment, "STARFLOW_GPUS", "0"))
    node = _number(environment, "STARFLOW_NODE_RANK")
    if node >= nodes:
        raise ConfigError(f"STARFLOW_NODE_RANK={node}, but STARFLOW_NODES={nodes}: machines are numbered from 0")
    if "STARFLOW_LAUNCH" not in environment:
        raise ConfigError("STARFLOW_LAUNCH is not set; on several machines the launcher has to set it")
    return Place(
        nodes=nodes,
        node=node,
        launch=environment["STARFLOW_LAUNCH"],
        address=environment.get("STARFLOW_ADDRESS") or socket.gethostname(),
        min_nodes=_number(environment, "STARFLOW_MIN_NODES", "1"),
        patience=_number(environment, "STARFLOW_PATIENCE", "60"),
        gpus=_number(environment, "STARFLOW_GPUS", "0"),
    )


def _number(environment: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = environment.get(name, default)
    if text is None:
        raise ConfigError(f"{name} is not set; on several machines the launcher has to set it")
    if not text.isdecimal():
        raise ConfigError(f"{name}={text} is not a whole number; the launcher has to set one")
    return int(text)


def with_ranks(config: TrainConfig, ranks: int) -> TrainConfig | None:
    """The same computation on another number of ranks; None if the global batch does not divide over them.

    Samples per backward pass do not grow, so that what fits in memory on all machines also does on fewer.
    """
    if ranks == config.ranks:
        return config
    per_rank, rest = divmod(config.global_batch_size, ranks)
    if rest or not per_rank:
        return None
    micro = max(size for size in range(1, config.micro + 1) if per_rank % size == 0)
    return config.model_copy(update={"ranks": ranks, "micro_batch_size": micro})


def announce(store: ObjectStore, run: str, news: Announcement) -> None:
    """Only the leader, which holds the lease, writes it."""
    store.write(f"runs/{run}/attempt.json", news.model_dump_json().encode())


def read_announcement(store: ObjectStore, run: str, launch: str) -> Announcement | None:
    """The newest announcement of this launch, or None."""
    try:
        news = json.loads(store.read(f"runs/{run}/attempt.json"))
    except NotFoundError:
        return None
    return Announcement.model_validate(news) if news["launch"] == launch else None


def stop_key(run: str, launch: str) -> str:
    """The object whose presence asks every machine of a launch to save and leave for good.

    A job that was re-queued is LAUNCH.COUNT to its machines (infra/launch/slurm.py); whoever stops it knows LAUNCH.
    """
    return f"runs/{run}/launches/{launch.partition('.')[0]}/stop"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
