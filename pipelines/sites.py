"""What a crawl process knows of each site: its rules, fetched once, and how often it may be asked."""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPMessage
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipelines.guard import FetchError, FetchPolicy, get
from pipelines.robots import ROBOTS_BYTES, Rules, parse_robots, parse_tdm, tdm_reserved
from starflow.urls import site_of

#: How long rules are kept (RFC 9309, section 2.4: at most a day), in seconds.
RULES_SECONDS = 86400
#: How long it is kept that they could not be read; by one process alone.
FAILURE_SECONDS = 300
#: A turn at a host that this process is not assigned is not waited for longer.
STRANGER_SECONDS = 60.0
#: A host that asks us to wait for longer is asked for nothing more meanwhile; its URLs are for a later try.
BUSY_SECONDS = 5.0
#: Content types of what people look at.
PAGES = ("text/html", "application/xhtml+xml")


@dataclass(frozen=True)
class SiteRules:
    """A site's rules: robots.txt, reserved paths, why they could not be read ("" when they could), whether that is
    final, and the time (seconds since 1970) until which all this holds."""

    robots: Rules = field(default_factory=Rules)
    reserved: tuple[str, ...] = ()
    failure: str = ""
    final: bool = False
    expires: float = math.inf

    def check(self, url: str) -> None:
        """Raises FetchError when the rules keep us from this URL, or cannot be read for now."""
        if self.failure:
            raise FetchError(self.failure, transient=not self.final)
        if not self.robots.allows(url):
            raise FetchError("robots_txt")
        if tdm_reserved(self.reserved, url):
            raise FetchError("tdm_reservation")


class _Turns:
    """The slots and the rate of one host; times are those of the monotonic clock."""

    def __init__(self, slots: int) -> None:
        self.slots = threading.BoundedSemaphore(slots)
        self.lock = threading.Lock()
        self.next_start = self.busy_until = 0.0

    def wait(self, interval: float, patience: float) -> None:
        """Waits until `interval` seconds after the turn before. Raises FetchError, perhaps after a while, when that is
        longer than `patience`, or when the host has asked us to wait for longer than is worth a thread."""
        while True:
            with self.lock:
                self._check_busy()
                now = time.monotonic()
                start = max(now, self.next_start, self.busy_until)
                if start - now > patience:
                    raise _busy(start - now)
                self.next_start = start + interval
            time.sleep(start - now)
            if self.busy_until <= start:
                return
            # Meanwhile the host has asked us to wait: the turns after that are given anew, one after the other.

    def _check_busy(self) -> None:
        left = self.busy_until - time.monotonic()
        if left > BUSY_SECONDS:
            raise _busy(left)

    def heed(self, error: FetchError) -> None:
        """Keeps the wait that a host asks for when it has too much to do."""
        if error.status in (429, 503) and error.retry_after:
            self.busy_until = max(self.busy_until, time.monotonic() + error.retry_after)


def _busy(seconds: float) -> FetchError:
    return FetchError("host_busy", transient=True, retry_after=seconds)


class Sites:
    """Rules and turns per site, shared by the threads of a process; rules also by processes, through `cache`.

    Of `processes`, this one asks for the URLs of the sites that it is `assigned`. To others it may be led by redirects,
    as may all processes: then it takes its share of what the host is asked.
    """

    def __init__(self, policy: FetchPolicy, cache: Path, processes: int = 1) -> None:
        self.policy, self.cache, self.processes = policy, cache, processes
        self.assigned: set[str] = set()
        self._rules: dict[str, SiteRules] = {}
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._turns: dict[str, _Turns] = {}

    @contextmanager
    def visit(self, url: str) -> Iterator[None]:
        """Surrounds one request: checks the site's rules, then waits for one of its host's slots and for its rate.

        Listed hosts are the operator's own and need no turns. Raises FetchError when the URL is not to be asked.
        """
        rules = self.rules(url)
        rules.check(url)
        parts = urlsplit(url)
        host = parts.hostname or ""
        if self.policy.trusts(host, parts.port or (443 if parts.scheme == "https" else 80)):
            yield
            return
        is_ours = site_of(host) in self.assigned
        share = 1 if is_ours else self.processes
        rate = self.policy.host_rate
        # setdefault, and not a defaultdict: two threads must not make two.
        turns = self._turns.get(host) or self._turns.setdefault(
            host, _Turns(max(1, self.policy.host_concurrency // share))
        )
        with turns.slots:
            interval = share * max(1 / rate if rate else 0.0, rules.robots.delay)
            turns.wait(interval, math.inf if is_ours else STRANGER_SECONDS)
            try:
                yield
            except FetchError as error:
                turns.heed(error)
                raise

    def rules(self, url: str) -> SiteRules:
        """The rules of the URL's origin, from memory, the cache folder or the site."""
        if not (self.policy.robots or self.policy.tdm):
            return SiteRules()
        origin = _origin(url)
        with self._locks[origin]:
            known = self._rules.get(origin)
            if known is None or known.expires < time.time():
                known = self._rules[origin] = self._read(origin)
            return known

    def _read(self, origin: str) -> SiteRules:
        path = self.cache / f"{hashlib.sha256(origin.encode()).hexdigest()[:32]}.json"
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            fresh = time.time() - entry["time"] < RULES_SECONDS
        except (FileNotFoundError, ValueError, KeyError):
            fresh = False
        if not fresh:
            try:
                entry = self._ask(origin) | {"time": time.time()}
            except FetchError as error:
                return _unreadable(error)
            unfinished = path.with_suffix(f".{threading.get_ident()}~")
            unfinished.write_text(json.dumps(entry), encoding="utf-8")
            unfinished.replace(path)
        return SiteRules(
            parse_robots(entry["robots"], self.policy.agent_token),
            parse_tdm(entry["tdm"]),
            expires=entry["time"] + RULES_SECONDS,
        )

    def _ask(self, origin: str) -> dict[str, Any]:
        return {
            "robots": self._text(f"{origin}/robots.txt", cut=True) if self.policy.robots else "",
            "tdm": self._tdm(f"{origin}/.well-known/tdmrep.json") if self.policy.tdm else "",
        }

    def _tdm(self, url: str) -> str:
        """Many sites answer with a page of theirs where they have no file: one that cannot be read reserves nothing."""
        kinds: list[str] = []
        try:
            return self._text(url, accept=lambda headers: kinds.append(headers.get_content_type()))
        except FetchError as error:
            if error.reason in ("too_large", "content_encoding") and kinds[-1] in PAGES:
                return ""
            raise

    def _text(self, url: str, cut: bool = False, accept: Callable[[HTTPMessage], None] | None = None) -> str:
        """A file of rules, or with `cut` its beginning; "" when the site has none, which allows everything (RFC 9309,
        2.3.1.2 and 2.3.1.3)."""
        policy = self.policy.model_copy(update={"max_bytes": ROBOTS_BYTES})
        try:
            return get(url, policy, accept=accept, cut=cut).body.decode("utf-8", "replace")
        except FetchError as error:
            missing = 400 <= error.status < 500 and not error.transient
            if missing or error.reason in ("redirects", "http_204"):
                return ""
            raise


def _unreadable(error: FetchError) -> SiteRules:
    """RFC 9309, 2.3.1.4: a site whose rules are unreachable forbids everything until they are back.

    When no answer came at all, its URLs fail as its rules did.
    """
    answered = error.status != 0
    return SiteRules(
        failure="robots_unavailable" if answered else error.reason,
        final=not (answered or error.transient),
        expires=time.time() + FAILURE_SECONDS,
    )


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"
