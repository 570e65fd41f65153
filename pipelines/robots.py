"""What sites ask of crawlers: robots.txt (RFC 9309), X-Robots-Tag, and the TDM reservation protocol."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from starflow.urls import resource_path

#: RFC 9309, section 2.5: a crawler must read at least this much of the file, and may ignore the rest.
ROBOTS_BYTES = 500 * 1024
#: X-Robots-Tag directives that carry a value after a colon, so that what precedes it is no agent's name.
_VALUED = {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}


@dataclass(frozen=True)
class Rules:
    """The rules of one robots.txt group: (allowed, path pattern in its one spelling), and a crawl delay in seconds."""

    rules: tuple[tuple[bool, str], ...] = ()
    delay: float = 0.0

    def allows(self, url: str) -> bool:
        """Whether the URL's path may be fetched: the longest matching pattern decides, a tie allows."""
        if not self.rules:
            return True
        parts = urlsplit(url)
        path = _literal((parts.path or "/") + (f"?{parts.query}" if parts.query else ""))
        verdicts = [(len(pattern), allowed) for allowed, pattern in self.rules if _matches(pattern, path)]
        return max(verdicts)[1] if verdicts else True


def _literal(path: str) -> str:
    """The one spelling of a path, with characters that mean something in patterns escaped (RFC 9309, 2.2.2, 2.2.3)."""
    return resource_path(path).replace("*", "%2A").replace("$", "%24")


def _matches(pattern: str, path: str) -> bool:
    anchored = pattern.endswith("$")
    pieces = (pattern[:-1] if anchored else pattern).replace("$", "%24").split("*")
    if not path.startswith(pieces[0]):
        return False
    position = len(pieces[0])
    # Each piece at its earliest place: linear, where a regular expression could be made to backtrack.
    for piece in pieces[1:]:
        found = path.find(piece, position)
        if found < 0:
            return False
        position = found + len(piece)
    if not anchored:
        return True
    return path.endswith(pieces[-1]) if len(pieces) > 1 else position == len(path)


def parse_robots(text: str, agent: str) -> Rules:
    """The group of `text` that binds `agent` (a product token, any case), else the group of ``*``."""
    groups: dict[str, list[tuple[str, str]]] = {}
    agents: list[str] = []
    in_rules = False
    for line in text.lstrip("\ufeff").splitlines():
        name, colon, value = line.split("#", 1)[0].partition(":")
        name, value = name.strip().lower(), value.strip()
        if not colon:
            continue
        if name == "user-agent":
            if in_rules:
                agents, in_rules = [], False
            token = value if value == "*" else re.split(r"[/\s]", value, maxsplit=1)[0].lower()
            agents.append(token)
            groups.setdefault(token, [])
        elif name in ("allow", "disallow", "crawl-delay"):
            in_rules = True
            for token in agents:
                groups[token].append((name, value))
    lines = groups.get(agent.lower(), groups.get("*", []))
    rules = tuple((name == "allow", resource_path(value)) for name, value in lines if name != "crawl-delay" and value)
    return Rules(rules, max((_seconds(value) for name, value in lines if name == "crawl-delay"), default=0.0))


def _seconds(text: str) -> float:
    try:
        return min(max(float(text), 0.0), 60.0)
    except ValueError:
        return 0.0


def opted_out(values: Iterable[str], agent: str, directives: Iterable[str], now: datetime) -> bool:
    """Whether X-Robots-Tag header `values` forbid `agent` (a product token) the use of the resource.

    Understands several headers, lists, per-agent forms (``otherbot: noai``), which bind what follows them in the same
    header, and ``unavailable_after: DATE``, which binds once the date has passed.
    """
    forbidden = set(directives)
    return any(
        _directive_forbids(directive, forbidden, now)
        for value in values
        for scope, directive in _directives(value)
        if scope in ("", "*", agent.lower())
    )


def _directives(value: str) -> Iterable[tuple[str, str]]:
    """(agent or "", directive) pairs of one header value; the comma inside a date splits nothing."""
    scope = ""
    for item in re.split(r",(?!\s*\d{1,2}[ -][A-Za-z]{3}[ -])", value):
        directive = item.strip().lower()
        name, colon, rest = directive.partition(":")
        if colon and name.strip() not in _VALUED:
            scope, directive = name.strip(), rest.strip()
        if directive:
            yield scope, directive


def _directive_forbids(directive: str, forbidden: set[str], now: datetime) -> bool:
    name, colon, value = directive.partition(":")
    if name.strip() == "unavailable_after" and colon:
        moment = _date(value.strip())
        return moment is not None and moment <= now
    return directive in forbidden


def _date(text: str) -> datetime | None:
    """A moment from RFC 822, RFC 850 or ISO 8601 text; None for anything else."""
    for parse in (parsedate_to_datetime, datetime.fromisoformat):
        try:
            moment = parse(text.upper())
        except (ValueError, TypeError, IndexError):
            continue
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return None


def parse_tdm(text: str) -> tuple[str, ...]:
    """Path patterns that a ``/.well-known/tdmrep.json`` reserves (W3C TDM Reservation Protocol, section 6.1).

    A file that is not what the protocol says reserves nothing.
    """
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError):
        return ()
    if not isinstance(entries, list):
        return ()
    return tuple(
        resource_path(str(entry.get("location", "")))
        for entry in entries
        if isinstance(entry, dict) and str(entry.get("tdm-reservation")) == "1"
    )


def tdm_reserved(patterns: Iterable[str], url: str) -> bool:
    """Whether one of the `patterns` of `parse_tdm` covers the URL's path."""
    return any(_matches(pattern, _literal(urlsplit(url).path or "/")) for pattern in patterns)
