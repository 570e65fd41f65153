"""Rules per site, and turns per host."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from pipelines.guard import FetchError, FetchPolicy
from pipelines.sites import Sites

POLICY = FetchPolicy(user_agent="starflow/0", agent_token="starflow", host_concurrency=2, host_rate=50.0)


class Rules(Sites):
    """Sites whose files come from a dictionary; counts what is asked for."""

    files: dict[str, str | FetchError]
    asked: list[str]

    def _text(self, url: str) -> str:
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


def test_rules_are_asked_for_once_and_shared_through_the_cache(tmp_path: Path) -> None:
    first = rules(tmp_path, robots="User-agent: *\nDisallow: /no")
    for _ in range(3):
        first.permit("http://a.example/yes")
        with pytest.raises(FetchError, match="robots_txt"):
            first.permit("http://a.example/no")
    assert len(first.asked) == 2
    second = rules(tmp_path)
    with pytest.raises(FetchError, match="robots_txt"):
        second.permit("http://a.example/no")
    assert second.asked == []


def test_a_site_whose_rules_are_down_is_left_alone_for_now(tmp_path: Path) -> None:
    sites = rules(tmp_path, robots=FetchError("http_503", transient=True, status=503))
    with pytest.raises(FetchError, match="robots_unavailable") as caught:
        sites.permit("http://a.example/x")
    assert caught.value.transient


def test_rules_may_be_switched_off(tmp_path: Path) -> None:
    policy = POLICY.model_copy(update={"robots": False, "tdm": False})
    sites = rules(tmp_path, policy, robots="User-agent: *\nDisallow: /")
    sites.permit("http://a.example/x")
    assert sites.asked == []


def test_tdm_reservations_hold(tmp_path: Path) -> None:
    sites = rules(tmp_path, tdm='[{"location": "/x/*", "tdm-reservation": 1}]')
    sites.permit("http://a.example/y/1")
    with pytest.raises(FetchError, match="tdm_reservation"):
        sites.permit("http://a.example/x/1")


def run_turns(sites: Sites, url: str, count: int) -> tuple[int, float]:
    """(most at once, seconds) of `count` short visits from as many threads."""
    inside, most = 0, 0
    lock = threading.Lock()

    def visit() -> None:
        nonlocal inside, most
        with sites.turn(url):
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
    sites = rules(tmp_path, robots="User-agent: *\nCrawl-delay: 0.1")
    sites.permit("http://a.example/x")
    assert run_turns(sites, "http://a.example/x", 4)[1] >= 0.3


def test_own_hosts_have_no_limits(tmp_path: Path) -> None:
    policy = POLICY.model_copy(update={"allow_host": ("a.example",), "host_rate": 0.1})
    assert run_turns(rules(tmp_path, policy), "http://a.example/x", 8)[1] < 5
