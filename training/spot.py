"""A cloud's notice that it is about to take this machine, as the machine's own metadata service gives it.

AWS: ``spot/instance-action`` of the EC2 Instance Metadata Service, version 2 (token first). Google Cloud:
``instance/preempted`` of the Compute Engine metadata server. Both are at a link-local address that answers in
milliseconds where it exists. The clouds' own variables move or disable them: AWS_EC2_METADATA_SERVICE_ENDPOINT,
AWS_EC2_METADATA_DISABLED, GCE_METADATA_HOST, NO_GCE_CHECK.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

#: Seconds between questions, as AWS recommends, and until one that gets no answer is given up; life of a token.
ASK_EVERY, PATIENCE, TOKEN_SECONDS = 5.0, 1.0, 60
#: Questions until a service that has not answered any is taken to be absent; a machine is busy when training starts.
FIRST_QUESTIONS = 3
_LINK_LOCAL = "http://169.254.169.254"
_TRUE = ("true", "1", "yes")


def aws_notice(environment: Mapping[str, str] = os.environ) -> str:
    """What AWS says it will do to this spot instance, or nothing. Raises OSError where there is no such service."""
    endpoint = environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", _LINK_LOCAL).rstrip("/")
    life = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}
    token = _ask(Request(f"{endpoint}/latest/api/token", headers=life, method="PUT"))
    url = f"{endpoint}/latest/meta-data/spot/instance-action"
    try:
        action = json.loads(_ask(Request(url, headers={"X-aws-ec2-metadata-token": token})))
    except HTTPError as answer:
        if answer.code == 404:  # nothing is planned
            return ""
        raise
    return f"AWS will {action['action']} this machine at {action['time']}"


def gcp_notice(environment: Mapping[str, str] = os.environ) -> str:
    """That Google Cloud is preempting this machine, or nothing. Raises OSError where there is no such service."""
    host = environment.get("GCE_METADATA_HOST", _LINK_LOCAL.removeprefix("http://"))
    url = f"http://{host}/computeMetadata/v1/instance/preempted"
    answer = _ask(Request(url, headers={"Metadata-Flavor": "Google"}))
    return "Google Cloud is preempting this machine" if answer.strip() == "TRUE" else ""


def clouds(environment: Mapping[str, str] = os.environ) -> list[Callable[[], str]]:
    """The services to ask, those that are disabled left out."""
    allowed = {aws_notice: "AWS_EC2_METADATA_DISABLED", gcp_notice: "NO_GCE_CHECK"}
    return [ask for ask, variable in allowed.items() if environment.get(variable, "").lower() not in _TRUE]


@contextmanager
def watch_notices(tell: Callable[[str], None]) -> Iterator[None]:
    """Asks in a thread, and calls `tell` there, once, with the first notice.

    Once a service has answered, those that have not are taken to be absent and not asked again; nor is any after
    FIRST_QUESTIONS without an answer.
    """
    closing = threading.Event()
    threading.Thread(target=_watch, args=(tell, closing), name="spot", daemon=True).start()
    try:
        yield
    finally:
        closing.set()  # a question under way is not waited for


def _watch(tell: Callable[[str], None], closing: threading.Event) -> None:
    present: list[Callable[[], str]] = []
    for _ in range(FIRST_QUESTIONS):
        present = [ask for ask in clouds() if _heard(ask) is not None]
        if present or closing.wait(ASK_EVERY):
            break
    while present and not closing.wait(ASK_EVERY):
        if notice := next((heard for ask in present if (heard := _heard(ask))), ""):
            tell(notice)
            return


def _heard(ask: Callable[[], str]) -> str | None:
    """The notice, or None for want of an answer that can be read."""
    try:
        return ask()
    except (OSError, HTTPException, ValueError, KeyError):
        return None


def _ask(request: Request) -> str:
    with build_opener(ProxyHandler({})).open(request, timeout=PATIENCE) as answer:
        return str(answer.read(2**16), "utf-8")
