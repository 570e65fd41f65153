"""One spelling per URL: what the ledger is keyed by, what is asked of servers, and what a takedown names."""

from __future__ import annotations

import functools
import hashlib
import re
import string
from collections.abc import Collection
from urllib.parse import quote, urlsplit, urlunsplit

#: Characters that may stand for themselves in a path or query (RFC 3986, section 3.3), and existing escapes.
_SAFE = "/%:@!$&'()*+,;=~-._"
#: Characters whose escapes mean the same (RFC 3986, section 2.3).
_UNRESERVED = frozenset(f"{string.ascii_letters}{string.digits}-._~")
_DEFAULT_PORTS = {"http": 80, "https": 443}


def normalise(url: str) -> str:
    """The canonical spelling of an http(s) URL: lower-case scheme and host, IDNA host, no default port,
    no fragment, spaces and non-ASCII characters percent-encoded.

    Raises ValueError for what is no such URL: another scheme, no host, credentials, a bad port.
    """
    cleaned = re.sub(r"[\t\r\n]", "", url.strip())
    parts = urlsplit(cleaned)
    scheme = parts.scheme.lower()
    if scheme not in _DEFAULT_PORTS:
        raise ValueError(f"scheme {scheme!r} is not http or https")
    if not parts.hostname or parts.username is not None or parts.password is not None:
        raise ValueError("no host, or credentials in the URL")
    host, port = host_name(parts.hostname), parts.port
    if ":" in host:
        host = f"[{host}]"
    if port is not None and port != _DEFAULT_PORTS[scheme]:
        host = f"{host}:{port}"
    return urlunsplit((scheme, host, _escape(parts.path) or "/", _escape(parts.query, "?"), ""))


@functools.lru_cache(2**16)
def host_name(host: str) -> str:
    """The canonical spelling of a host alone: lower case, IDNA, no final dot; an IPv6 address as it stands.

    Raises ValueError for what is no name.
    """
    if ":" in host:
        return host.lower()
    try:
        return host.rstrip(".").encode("idna").decode("ascii").lower()
    except UnicodeError as error:
        raise ValueError(f"host {host!r} is not a valid name") from error


def site_of(host: str) -> str:
    """The host without ``www.``: the two commonly redirect to each other."""
    return host.removeprefix("www.")


def host_alone(text: str) -> str:
    """`host_name` of what a person wrote. Raises ValueError for what is no host alone, such as a URL or a wildcard."""
    hosts = {host_of(f"http://{text}/"), host_of(f"http://[{text}]/")} - {""}
    name = host_name(text)
    if "*" in text or name not in hosts:
        raise ValueError(f"host {text!r} is not a name or address alone; example.org means its subdomains, too")
    return name


def _escape(text: str, more: str = "") -> str:
    text = re.sub(r"%(?![0-9A-Fa-f]{2})", "%25", text)
    return quote(text, safe=_SAFE + more)


def canonical(url: str) -> str:
    """The normalised URL; what cannot be normalised, such as ``s3://``, as it stands."""
    try:
        return normalise(url)
    except ValueError:
        return url


def resource(url: str) -> str:
    """What all spellings of an address share: canonical, its escapes in upper case and none that is not needed.

    Source: RFC 3986, section 6.2.2. Servers are asked, and the ledger is keyed, with escapes as the list has them.
    """
    try:
        return re.sub("%[0-9A-Fa-f]{2}", _escaped, normalise(url))
    except ValueError:
        return url


def resource_path(path: str) -> str:
    """A path, with its query, as `resource` spells it; also a pattern of paths."""
    path = path.encode("utf-8", "replace").decode("utf-8")  # JSON may hold half of a character
    return re.sub("%[0-9A-Fa-f]{2}", _escaped, _escape(path, "?"))


def _escaped(found: re.Match[str]) -> str:
    character = chr(int(found[0][1:], 16))
    return character if character in _UNRESERVED else found[0].upper()


def url_key(url: str) -> str:
    """The ledger's key: 128 bits, as 32 hex digits, of the SHA-256 of the canonical URL.

    What cannot be normalised has a key, too, so that it is refused once and not again each night.
    """
    return hashlib.sha256(canonical(url).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def is_below(host: str, hosts: Collection[str]) -> bool:
    """Whether a host is one of `hosts`, or below one; all in their canonical spelling."""
    labels = host.split(".") if hosts else []
    return any(".".join(labels[start:]) in hosts for start in range(len(labels)))


def host_of(url: str) -> str:
    """Host of a URL in its canonical spelling, without port; the empty string when it has none."""
    try:
        return host_name(urlsplit(url.strip()).hostname or "")
    except ValueError:
        return ""
