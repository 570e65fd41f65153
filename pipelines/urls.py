"""One spelling per URL: what the ledger is keyed by and what is asked of servers."""

from __future__ import annotations

import hashlib
import re
from urllib.parse import quote, urlsplit, urlunsplit

#: Characters that may stand for themselves in a path or query (RFC 3986, section 3.3), and existing escapes.
_SAFE = "/%:@!$&'()*+,;=~-._"
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
    host, port = _ascii_host(parts.hostname), parts.port
    if port is not None and port != _DEFAULT_PORTS[scheme]:
        host = f"{host}:{port}"
    return urlunsplit((scheme, host, _escape(parts.path) or "/", _escape(parts.query, "?"), ""))


def _ascii_host(host: str) -> str:
    if ":" in host:
        return f"[{host}]"
    try:
        return host.rstrip(".").encode("idna").decode("ascii").lower()
    except UnicodeError as error:
        raise ValueError(f"host {host!r} is not a valid name") from error


def _escape(text: str, more: str = "") -> str:
    text = re.sub(r"%(?![0-9A-Fa-f]{2})", "%25", text)
    return quote(text, safe=_SAFE + more)


def url_key(url: str) -> str:
    """The ledger's key: 128 bits, as 32 hex digits, of the SHA-256 of the normalised URL.

    What cannot be normalised is keyed as it stands, so that it is refused once and not again each night.
    """
    try:
        text = normalise(url)
    except ValueError:
        text = url
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def host_of(url: str) -> str:
    """Host name of a URL, in lower case; the empty string when it has none."""
    try:
        return (urlsplit(url).hostname or "").lower()
    except ValueError:
        return ""
