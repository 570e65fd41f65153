"""A few workers on Ray: each holds a model, takes one job a call, and is replaced when it dies.

The same jobs go on a laptop (a cluster of just these actors is started, and stopped at the end) and on an existing
cluster (``address="auto"`` finds the running one, also from a job that `ray job submit` started). This is the only
module that knows Ray.
"""

from __future__ import annotations

import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from starflow.errors import StarflowError

#: A job whose actors died this often is given up: it probably needs more memory than there is.
ATTEMPTS = 3
#: Seconds that a cluster may take to start an actor and load its models.
START_SECONDS = 600.0
#: Jobs in hand of one actor: while one is in the model the other is read or written.
JOBS_IN_HAND = 2

#: The arguments of one call.
Job = tuple[Any, ...]


class ActorError(StarflowError):
    """Workers that cannot be started, or that keep dying."""


@dataclass(frozen=True)
class Resources:
    """How many actors, what Ray reserves for each, and the cluster (None: one is started here)."""

    actors: int
    cpus: int
    gpus: float
    address: str | None


class ActorPool:
    """Actors of one class, each replaced when it dies."""

    def __init__(self, count: int, start: Callable[[], ActorHandle]) -> None:
        self._start = start
        self._actors = [start() for _ in range(count)]

    def ask(self, method: str) -> Any:
        """Calls `method` of every actor, which loads its models; returns the first one's answer."""
        try:
            return ray.get([getattr(actor, method).remote() for actor in self._actors], timeout=START_SECONDS)[0]
        except GetTimeoutError as error:
            raise ActorError(
                f"the Ray cluster started no {len(self._actors)} actors within {START_SECONDS:.0f} s; it may have "
                "too few free CPUs or GPUs: see `ray status`, and lower actors, cpus_per_actor or gpus_per_actor"
            ) from error
        except RayTaskError as error:
            raise _cause(error) from None
        except RayActorError as error:
            raise ActorError(f"an actor died while starting, perhaps for lack of memory: {error}") from error

    def map(self, method: str, jobs: Iterable[Job]) -> Iterator[tuple[Job, Any]]:
        """Calls `method` with each job's arguments; yields jobs with their answers as they are finished.

        A job whose actor died is given to another. Raises ActorError for one that kills `ATTEMPTS` of them, and
        whatever error of ours a job raises.
        """
        waiting: deque[tuple[int, Job]] = deque()
        source = enumerate(jobs)
        attempts: Counter[int] = Counter()
        running: dict[ray.ObjectRef, tuple[ActorHandle, int, Job]] = {}
        while True:
            while (actor := self._free([actor for actor, _, _ in running.values()])) is not None:
                found = waiting.popleft() if waiting else next(source, None)
                if found is None:
                    break
                number, job = found
                running[getattr(actor, method).remote(*job)] = (actor, number, job)
            if not running:
                return
            ready, _ = ray.wait(list(running), num_returns=1)
            actor, number, job = running.pop(ready[0])
            try:
                answer = ray.get(ready[0])
            except RayActorError as error:
                attempts[number] += 1
                if attempts[number] >= ATTEMPTS:
                    raise ActorError(
                        f"{method}{job!r:.200} failed {ATTEMPTS} times because its actor died ({error}); "
                        "give actors more memory, or use smaller batches"
                    ) from error
                self._replace(actor)
                waiting.append((number, job))
            except RayTaskError as error:
                raise _cause(error) from None
            else:
                yield job, answer

    def _free(self, busy: list[ActorHandle]) -> ActorHandle | None:
        """The actor with the least work in hand, if it can take more."""
        actor = min(self._actors, key=busy.count)
        return actor if busy.count(actor) < JOBS_IN_HAND else None

    def _replace(self, dead: ActorHandle) -> None:
        """Starts another actor in the place of `dead`, unless that has been done."""
        if dead in self._actors:
            self._actors[self._actors.index(dead)] = self._start()


def _cause(error: RayTaskError) -> Exception:
    """The error raised in the actor, where it is one of ours."""
    return error.cause if isinstance(error.cause, StarflowError) else error


@contextmanager
def actor_pool(worker: type, resources: Resources, *arguments: Any) -> Iterator[ActorPool]:
    """Actors ``worker(*arguments)`` on the configured cluster; one that was started here is stopped again."""
    own = not ray.is_initialized()
    if own:
        _connect(resources)
    try:
        actor: Any = ray.remote(worker).options(
            num_cpus=resources.cpus, num_gpus=resources.gpus, max_concurrency=JOBS_IN_HAND
        )
        yield ActorPool(resources.actors, lambda: actor.remote(*arguments))
    finally:
        if own:
            ray.shutdown()


def _connect(resources: Resources) -> None:
    """Joins the cluster, or starts one of just the resources that the actors need, on the loopback interface."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if resources.address is not None:
        try:
            ray.init(address=resources.address, log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            raise ActorError(
                f"no Ray cluster at address {resources.address!r}; start one with `ray start --head`, or leave the "
                "address out"
            ) from error
        return
    ray.init(
        address="local",
        num_cpus=resources.actors * resources.cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address="127.0.0.1",
        object_store_memory=100 * 2**20,  # answers are small; shards go straight to the store
    )
