"""What a crawl process knows of each site: its rules, fetched once, and how often it may be asked."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from pipelines.guard import FetchError, FetchPolicy, get
from pipelines.robots import ROBOTS_BYTES, Rules, parse_robots, parse_tdm, tdm_reserved

#: How long rules are kept (RFC 9309, section 2.4: at most a day), in seconds.
RULES_SECONDS = 86400


@dataclass(frozen=True)
class SiteRules:
    """A site's rules: robots.txt, reserved paths, and why its rules could not be read ("" when they could)."""

    robots: Rules = field(default_factory=Rules)
    reserved: tuple[str, ...] = ()
    failure: str = ""


@dataclass
class _Turns:
    slots: threading.BoundedSemaphore
    lock: threading.Lock = field(default_factory=threading.Lock)
    next_start: float = 0.0


class Sites:
    """Rules and turns per site, shared by the threads of a process; rules also by processes, through `cache`."""

    def __init__(self, policy: FetchPolicy, cache: Path) -> None:
        self.policy, self.cache = policy, cache
        self._rules: dict[str, SiteRules] = {}
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._turns: defaultdict[str, _Turns] = defaultdict(
            lambda: _Turns(threading.BoundedSemaphore(policy.host_concurrency))
        )

    def permit(self, url: str) -> None:
        """Raises FetchError when the site's rules keep us from this URL, or cannot be read for now."""
        if not (self.policy.robots or self.policy.tdm):
            return
        rules = self.rules(url)
        if rules.failure:
            raise FetchError(rules.failure, transient=True)
        if not rules.robots.allows(url):
            raise FetchError("robots_txt")
        if tdm_reserved(rules.reserved, url):
            raise FetchError("tdm_reservation")

    @contextmanager
    def turn(self, url: str) -> Iterator[None]:
        """Waits for one of the site's slots and for its rate; listed hosts are the operator's own and need neither."""
        parts = urlsplit(url)
        host = parts.hostname or ""
        if self.policy.trusts(host, parts.port or (443 if parts.scheme == "https" else 80)):
            yield
            return
        rate = self.policy.host_rate
        delay = self._rules.get(_origin(url), SiteRules()).robots.delay
        interval = max(1 / rate if rate else 0.0, delay)
        turns = self._turns[host]
        with turns.slots:
            with turns.lock:
                start = max(time.monotonic(), turns.next_start)
                turns.next_start = start + interval
            time.sleep(max(0.0, start - time.monotonic()))
            yield

    def rules(self, url: str) -> SiteRules:
        """The rules of the URL's origin, from memory, the cache folder or the site."""
        origin = _origin(url)
        with self._locks[origin]:
            if origin not in self._rules:
                self._rules[origin] = self._cached(origin)
            return self._rules[origin]

    def _cached(self, origin: str) -> SiteRules:
        path = self.cache / f"{hashlib.sha256(origin.encode()).hexdigest()[:32]}.json"
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            fresh = time.time() - entry["time"] < RULES_SECONDS
        except (FileNotFoundError, ValueError, KeyError):
            fresh = False
        if not fresh:
            entry = self._ask(origin) | {"time": time.time()}
            unfinished = path.with_suffix(f".{threading.get_ident()}~")
            unfinished.write_text(json.dumps(entry), encoding="utf-8")
            unfinished.replace(path)
        return SiteRules(
            parse_robots(entry["robots"], self.policy.agent_token), parse_tdm(entry["tdm"]), entry["failure"]
        )

    def _ask(self, origin: str) -> dict[str, str]:
        entry = {"robots": "", "tdm": "", "failure": ""}
        try:
            if self.policy.robots:
                entry["robots"] = self._text(f"{origin}/robots.txt")
            if self.policy.tdm:
                entry["tdm"] = self._text(f"{origin}/.well-known/tdmrep.json")
        except FetchError as error:
            # RFC 9309, 2.3.1.4: a site whose rules are unreachable forbids everything until they are back.
            entry["failure"] = error.reason if not error.status else "robots_unavailable"
        return entry

    def _text(self, url: str) -> str:
        try:
            body = get(url, self.policy).body
        except FetchError as error:
            if error.transient:
                raise
            return ""  # RFC 9309, 2.3.1.3: a site without such a file allows everything
        return body[:ROBOTS_BYTES].decode("utf-8", "replace")


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"
