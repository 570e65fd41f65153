"""Rules per site, and turns per host."""

from __future__ import annotations

import json
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.guard import FetchError, FetchPolicy
from pipelines.sites import Sites
from tests.pipelines.hostile_web import response
from tests.pipelines.test_guard import serving

POLICY = FetchPolicy(user_agent="starflow/0", agent_token="starflow", host_concurrency=2, host_rate=50.0)


class Rules(Sites):
    """Sites whose files come from a dictionary; counts what is asked for."""

    files: dict[str, str | FetchError]
    asked: list[str]

    def _text(self, url: str, *_: Any, **__: Any) -> str:
        self.asked.append(url)
        found = self.files.get(url, "")
        if isinstance(found, FetchError):
            raise found
        return found


def rules(cache: Path, policy: FetchPolicy = POLICY, **files: str | FetchError) -> Rules:
    sites = Rules(policy, cache)
    names = {"robots": "robots.txt", "tdm": ".well-known/tdmrep.json"}
    sites.files = {f"http://a.example/{names[name]}": text for name, text in files.items()}
    sites.asked = []
    return sites


def ask(sites: Sites, url: str) -> None:
    with sites.visit(url):
        pass


def test_rules_are_asked_for_once_and_shared_through_the_cache(tmp_path: Path) -> None:
    first = rules(tmp_path, robots="User-agent: *\nDisallow: /no")
    for _ in range(3):
        ask(first, "http://a.example/yes")
        with pytest.raises(FetchError, match="robots_txt"):
            ask(first, "http://a.example/no")
    assert len(first.asked) == 2
    second = rules(tmp_path)
    with pytest.raises(FetchError, match="robots_txt"):
        ask(second, "http://a.example/no")
    assert second.asked == []


def test_a_site_whose_rules_are_down_is_left_alone_for_now(tmp_path: Path) -> None:
    sites = rules(tmp_path, robots=FetchError("http_503", transient=True, status=503))
    with pytest.raises(FetchError, match="robots_unavailable") as caught:
        ask(sites, "http://a.example/x")
    assert caught.value.transient


def test_unreadable_rules_are_asked_for_again_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sites = rules(tmp_path, robots=FetchError("http_503", transient=True, status=503))
    for _ in range(2):
        with pytest.raises(FetchError, match="robots_unavailable"):
            ask(sites, "http://a.example/x")
    assert len(sites.asked) == 1
    later = time.time() + 301
    monkeypatch.setattr("pipelines.sites.time.time", lambda: later)
    sites.files = {}
    ask(sites, "http://a.example/x")
    other = rules(tmp_path)
    ask(other, "http://a.example/x")
    assert other.asked == []


def test_what_is_wrong_with_the_host_itself_is_said_of_the_url(tmp_path: Path) -> None:
    sites = rules(tmp_path, robots=FetchError("private_address"))
    with pytest.raises(FetchError, match="private_address") as caught:
        ask(sites, "http://a.example/x")
    assert not caught.value.transient


@pytest.mark.parametrize(
    ("answer", "allowed"),
    [
        (response(b"no", status="HTTP/1.1 404 No"), True),
        (response(b"no", status="HTTP/1.1 403 No"), True),
        (response(b"", status="HTTP/1.1 204 Nothing"), True),
        (response(b"", "Location: /robots.txt", status="HTTP/1.1 301 Loop"), True),
        (response(b"x", "Content-Encoding: br"), False),
        (response(b"no", status="HTTP/1.1 501 No"), False),
        (response(b"no", status="HTTP/1.1 429 No"), False),
        (response(b"no", status="HTTP/1.1 530 No"), False),
        (response(b"", "Location: http://10.0.0.1/", status="HTTP/1.1 302 Found"), False),
        (response(b"User-agent: *\nDisallow: /\n" + b"# x\n" * 200_000), None),
        (response(b"# x\n" * 200_000), True),
    ],
)
def test_robots_that_cannot_be_read_forbid_and_missing_ones_allow(
    tmp_path: Path, answer: bytes, allowed: bool | None
) -> None:
    """Also of a file larger than a picture may be, the beginning holds."""
    with serving(answer) as (place, _):
        policy = POLICY.model_copy(update={"allow_host": ("127.0.0.1",), "max_bytes": 1000, "tdm": False})
        sites = Sites(policy, tmp_path)
        if allowed:
            return ask(sites, f"http://{place}/x")
        with pytest.raises(FetchError) as caught:
            ask(sites, f"http://{place}/x")
    expected = ("robots_txt", False) if allowed is None else ("robots_unavailable", True)
    assert (caught.value.reason, caught.value.transient) == expected


def test_rules_may_be_switched_off(tmp_path: Path) -> None:
    policy = POLICY.model_copy(update={"robots": False, "tdm": False})
    sites = rules(tmp_path, policy, robots="User-agent: *\nDisallow: /")
    ask(sites, "http://a.example/x")
    assert sites.asked == []


def test_tdm_reservations_hold(tmp_path: Path) -> None:
    sites = rules(tmp_path, tdm='[{"location": "/x/*", "tdm-reservation": 1}]')
    ask(sites, "http://a.example/y/1")
    with pytest.raises(FetchError, match="tdm_reservation"):
        ask(sites, "http://a.example/x/1")


def run_turns(sites: Sites, url: str, count: int) -> tuple[int, float]:
    """(most at once, seconds) of `count` short visits from as many threads."""
    inside, most = 0, 0
    lock = threading.Lock()

    def visit() -> None:
        nonlocal inside, most
        with sites.visit(url):
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.02)
            with lock:
                inside -= 1

    threads = [threading.Thread(target=visit) for _ in range(count)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return most, time.monotonic() - started


def test_turns_keep_concurrency_and_rate(tmp_path: Path) -> None:
    most, seconds = run_turns(rules(tmp_path), "http://a.example/x", 12)
    assert most <= 2
    assert seconds >= 11 / 50


def test_the_crawl_delay_of_a_site_holds(tmp_path: Path) -> None:
    """From the first request on."""
    sites = rules(tmp_path, robots="User-agent: *\nCrawl-delay: 0.1")
    assert run_turns(sites, "http://a.example/x", 4)[1] >= 0.3


def test_own_hosts_have_no_limits(tmp_path: Path) -> None:
    policy = POLICY.model_copy(update={"allow_host": ("a.example",), "host_rate": 0.1})
    assert run_turns(rules(tmp_path, policy), "http://a.example/x", 8)[1] < 7 / 0.1


def answered(sites: Sites, retry_after: float, url: str = "http://a.example/1") -> None:
    with pytest.raises(FetchError, match="http_429"), sites.visit(url):
        raise FetchError("http_429", transient=True, status=429, retry_after=retry_after)


def test_a_host_that_asks_us_to_wait_is_left_alone(tmp_path: Path) -> None:
    sites = rules(tmp_path)
    answered(sites, 600)
    started = time.monotonic()
    for _ in range(50):
        with pytest.raises(FetchError, match="host_busy") as caught:
            ask(sites, "http://a.example/2")
    assert time.monotonic() - started < 100
    assert caught.value.transient
    assert 450 < (caught.value.retry_after or 0) <= 600
    ask(sites, "http://b.example/3")


def test_urls_that_wait_for_their_turn_hear_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sites, waits = rules(tmp_path, POLICY.model_copy(update={"host_rate": 0.02})), []
    ask(sites, "http://a.example/0")

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        sites._turns["a.example"].busy_until = time.monotonic() + 600

    clock = SimpleNamespace(monotonic=time.monotonic, time=time.time, sleep=sleep)
    monkeypatch.setattr("pipelines.sites.time", clock)
    with pytest.raises(FetchError, match="host_busy"):
        ask(sites, "http://a.example/1")
    assert len(waits) == 1


def test_a_short_wait_is_waited_for(tmp_path: Path) -> None:
    sites = rules(tmp_path)
    started = time.monotonic()
    answered(sites, 0.2)
    ask(sites, "http://a.example/2")
    assert time.monotonic() - started > 0.15


def test_after_a_short_wait_the_rate_holds(tmp_path: Path) -> None:
    sites = rules(tmp_path, robots="User-agent: *\nCrawl-delay: 0.2")
    ask(sites, "http://a.example/0")
    started = time.monotonic()
    sites._turns["a.example"].busy_until = started + 0.5
    run_turns(sites, "http://a.example/x", 3)
    assert time.monotonic() - started >= 0.5 + 2 * 0.2


def test_a_turn_at_a_host_of_another_process_is_not_waited_for_long(tmp_path: Path) -> None:
    sites = rules(tmp_path, POLICY.model_copy(update={"host_rate": 0.1}))
    sites.processes = 8
    ask(sites, "http://b.example/1")
    with pytest.raises(FetchError, match="host_busy") as caught:
        ask(sites, "http://b.example/2")
    assert 60 < (caught.value.retry_after or 0) <= 80


@pytest.mark.parametrize("file", ["long", "br"])
@pytest.mark.parametrize("kind", ["text/html; charset=utf-8", "application/json"])
def test_a_page_that_is_no_tdm_file_reserves_nothing(tmp_path: Path, file: str, kind: str) -> None:
    """A file that cannot be read may reserve anything."""
    headers = [f"Content-Type: {kind}", *["Content-Encoding: br"] * (file == "br")]
    body = b"x" if file == "br" else json.dumps([{"location": "/y", "tdm-reservation": 1}] * 20_000).encode()
    with serving(response(body, *headers)) as (place, _):
        policy = POLICY.model_copy(update={"allow_host": ("127.0.0.1",), "robots": False})
        sites = Sites(policy, tmp_path)
        with nullcontext() if "html" in kind else pytest.raises(FetchError, match="robots_unavailable"):
            ask(sites, f"http://{place}/x")


@pytest.mark.parametrize("kind", ["text/html", "application/json", "application/octet-stream"])
def test_a_reservation_holds_whatever_its_file_says_it_is(tmp_path: Path, kind: str) -> None:
    body = b'[{"location": "/y", "tdm-reservation": 1}]'
    with serving(response(body, f"Content-Type: {kind}")) as (place, _):
        sites = Sites(POLICY.model_copy(update={"allow_host": ("127.0.0.1",), "robots": False}), tmp_path)
        with pytest.raises(FetchError, match="tdm_reservation"):
            ask(sites, f"http://{place}/y")


def test_a_host_met_only_by_redirect_is_shared_with_other_processes(tmp_path: Path) -> None:
    sites = rules(tmp_path)
    sites.processes, sites.assigned = 2, {"a.example"}
    with sites.visit("http://www.a.example/x"), sites.visit("http://www.a.example/x"):
        pass  # two slots; with one, this would hang
    most, seconds = run_turns(sites, "http://b.example/x", 4)
    assert most == 1
    assert seconds >= 3 * 2 / 50
