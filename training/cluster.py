"""Several machines: who this one is, and how the supervisors keep in step through the store.

Launchers set STARFLOW_NODES, STARFLOW_NODE_RANK, STARFLOW_RENDEZVOUS (host:port on machine 0) and
STARFLOW_LAUNCH (any name, the same on all machines and new for each launch). Machine 0 leads: it holds the
lease, numbers the attempts and announces them in the store; the others follow.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from starflow.errors import ConfigError, NotFoundError
from starflow.objectstore import ObjectStore
from training.launch import Outcome

#: Attempts use ports in turn, so that stragglers of one never meet the next.
PORTS = 16


@dataclass(frozen=True)
class Place:
    """This machine among those of a launch."""

    nodes: int = 1
    node: int = 0
    host: str = "127.0.0.1"
    port: int = 29500
    launch: str = ""

    def share(self, ranks: int) -> int:
        """Ranks on this machine. Raises ConfigError unless all machines get the same number."""
        if ranks % self.nodes:
            raise ConfigError(f"ranks {ranks} do not divide over {self.nodes} machines; change one of them")
        return ranks // self.nodes

    def torchrun(self, attempt: int) -> list[str]:
        """Rendezvous arguments: a free loopback port alone, a fixed one of machine 0 among several."""
        if self.nodes == 1:
            return ["--standalone"]
        return [
            *("--nnodes", str(self.nodes), "--node-rank", str(self.node)),
            *("--master-addr", self.host, "--master-port", str(self.port + attempt % PORTS)),
        ]


@dataclass(frozen=True)
class Announcement:
    """What machine 0 tells the others: attempt `attempt` of `launch` begins, or the run has ended."""

    launch: str
    attempt: int
    outcome: Outcome | None = None


def place_from_environment(environment: Mapping[str, str] = os.environ) -> Place:
    """The place that the launcher set; a single machine without one. Raises ConfigError naming the variable."""
    if int(environment.get("STARFLOW_NODES", "1")) == 1:
        return Place()
    try:
        host, _, port = environment["STARFLOW_RENDEZVOUS"].rpartition(":")
        return Place(
            nodes=int(environment["STARFLOW_NODES"]),
            node=int(environment["STARFLOW_NODE_RANK"]),
            host=host,
            port=int(port),
            launch=environment["STARFLOW_LAUNCH"],
        )
    except KeyError as error:
        raise ConfigError(f"{error.args[0]} is not set; on several machines the launcher has to set it") from error
    except ValueError as error:
        raise ConfigError(
            f"STARFLOW_RENDEZVOUS={environment['STARFLOW_RENDEZVOUS']} is not host:port, or a node number is no number"
        ) from error


def announce(store: ObjectStore, run: str, news: Announcement) -> None:
    """Only machine 0, which holds the lease, writes it."""
    store.write(f"runs/{run}/attempt.json", json.dumps(asdict(news)).encode())


def read_announcement(store: ObjectStore, run: str, launch: str) -> Announcement | None:
    """The newest announcement of this launch, or None."""
    try:
        news = Announcement(**json.loads(store.read(f"runs/{run}/attempt.json")))
    except NotFoundError:
        return None
    return news if news.launch == launch else None
