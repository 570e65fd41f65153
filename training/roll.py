"""Which machines of a launch are there: each keeps an object in the store fresh while its supervisor lives.

Writing it is also the check, before anything expensive starts, that a machine reaches the store.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import starflow
from starflow.config import Config
from starflow.errors import NotFoundError, StoreError
from starflow.objectstore import ObjectStore
from training.cluster import Place, stop_key
from training.processes import is_gone
from training.silence import Silence


class Ended(Config):
    """How an attempt ended on a machine."""

    attempt: int
    message: str
    retry: bool


class Member(Config):
    """A machine as it describes itself. beats: grows, so that the object changes while the supervisor lives."""

    node: int
    owner: str
    address: str
    versions: str
    problem: str = ""
    ended: Ended | None = None
    beats: int = 0

    @property
    def name(self) -> str:
        return f"machine {self.node} ({self.address})"


class Roll:
    """``runs/<run>/nodes/<launch>/<node>.json``; a context manager that keeps this machine's own fresh.

    Whether another machine is alive is told by its object changing, see training/silence.py. Safe to use from several
    threads.
    """

    def __init__(
        self, store: ObjectStore, run: str, place: Place, owner: str, seconds: float, on_stop: Callable[[], None]
    ) -> None:
        """`seconds`: silence after which a machine counts as gone. `on_stop`: called when the launch shall end."""
        self._store, self._run, self._place, self._seconds, self._on_stop = store, run, place, seconds, on_stop
        self._prefix = f"runs/{run}/nodes/{place.launch}/"
        self.me = Member(
            node=place.node, owner=owner, address=place.address, versions=versions(), problem=problem(place)
        )
        self._seen: dict[str, tuple[str, Member]] = {}  # key: tag, content
        self._silence = Silence(seconds)
        self._writing, self._looking, self._closing = threading.Lock(), threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep_fresh, name="roll", daemon=True)

    def __enter__(self) -> Roll:
        """Raises StoreError when the store cannot be written from here."""
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        """The others see at once that this machine has left."""
        self._closing.set()
        self._thread.join()
        with contextlib.suppress(StoreError):
            self._store.delete([self._key(self._place.node)])

    @property
    def stop_asked(self) -> bool:
        """Whether `starflow launch stop` has ended this launch for good."""
        return bool(self._place.launch) and self._store.head(stop_key(self._run, self._place.launch)) is not None

    def say(self, ended: Ended) -> None:
        """Lets the leader know at once how this machine's part of an attempt ended."""
        with contextlib.suppress(StoreError):
            self._beat(ended=ended)

    def look(self) -> dict[int, Member]:
        """The machines that are there, by number."""
        with self._looking:
            tags = {info.key: info.etag for info in self._store.list(self._prefix)}
            silent = self._silence.look(tags)
            for key, tag in tags.items():
                if self._seen.get(key, ("",))[0] != tag:
                    with contextlib.suppress(NotFoundError, ValueError):  # it left between list and read
                        self._seen[key] = (tag, Member.model_validate_json(self._store.read(key)))
            known = [self._seen[key][1] for key in tags if key in self._seen and silent[key] < self._seconds]
        return {member.node: member for member in known if not is_gone(member.owner)}

    def _key(self, node: int) -> str:
        return f"{self._prefix}{node:05d}.json"

    def _beat(self, **news: Ended) -> None:
        with self._writing:
            self.me = self.me.model_copy(update={**news, "beats": self.me.beats + 1})
            self._store.write(self._key(self.me.node), self.me.model_dump_json().encode())

    def _keep_fresh(self) -> None:
        while not self._closing.wait(self._seconds / 6):
            with contextlib.suppress(StoreError):  # tried again; the others notice if it lasts
                self._beat()
                if self.stop_asked:
                    self._on_stop()
                self.look()  # so that silence counts without a break


def versions() -> str:
    """What must be the same on all machines."""
    return f"starflow {starflow.__version__}, torch {version('torch')}"


def problem(place: Place) -> str:
    """Why this machine cannot take part, or nothing."""
    if not place.gpus:
        return ""
    import torch

    if torch.cuda.device_count() < place.gpus:
        return f"has {torch.cuda.device_count()} GPUs, {place.gpus} are needed; check its driver, or launch with fewer"
    return ""
