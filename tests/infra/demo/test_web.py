import io
import socket
import urllib.error
import urllib.request
from collections import Counter

import pyarrow.parquet as pq
import pytest
from PIL import Image, UnidentifiedImageError

from infra.demo.emoji import LICENCE
from infra.demo.web import HAZARDS, HTML, PRIVATE, start_web
from starflow.errors import StarflowError

PICTURES, ADDED = 44, 6


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    server = start_web(tmp_path_factory.mktemp("web"), limit=PICTURES, hazard_every=2, second=ADDED)
    try:
        yield server
    finally:
        server.stop()
    assert server.process.returncode == 0


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments):
        return None


def fetch(url):
    opener = urllib.request.build_opener(NoRedirect)
    try:
        with opener.open(url, timeout=60) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def urls(web, kind):
    return [url for url in pq.read_table(web.lists[1])["url"].to_pylist() if url.startswith(f"{web.address}/{kind}/")]


def test_the_second_list_is_the_first_and_more(web):
    first, second = pq.read_table(web.lists[0]).to_pylist(), pq.read_table(web.lists[1]).to_pylist()
    assert second[: len(first)] == first
    assert web.pictures == PICTURES
    assert len(second) - len(first) >= ADDED
    assert all(row["caption"] and row["licence"] == LICENCE for row in second)
    assert len({row["url"] for row in second}) == len(second)


def test_every_hazard_is_dealt_out(web):
    kinds = Counter(
        row["url"].removeprefix(web.address).split("/")[1] for row in pq.read_table(web.lists[1]).to_pylist()
    )
    assert kinds.keys() == {*HAZARDS, "emoji"}
    assert {kind: count for kind, count in kinds.items() if kind != "emoji"} == web.hazard_kinds


def test_plain_pictures_decode(web):
    for url in urls(web, "emoji")[:5]:
        status, headers, body = fetch(url)
        assert (status, headers["Content-Type"]) == (200, "image/png")
        assert Image.open(io.BytesIO(body)).size == (72, 72)


def test_hazards_behave_as_named(web):
    assert fetch(urls(web, "missing")[0])[0] == 404
    flaky = urls(web, "flaky")[0]
    assert [fetch(flaky)[0] for _ in range(3)] == [500, 200, 200]
    status, headers, body = fetch(urls(web, "page")[0])
    assert (status, headers["Content-Type"], body) == (200, "image/png", HTML)
    assert fetch(urls(web, "optout")[0])[1]["X-Robots-Tag"] == "noai"
    status, headers, _ = fetch(urls(web, "private")[0])
    assert (status, headers["Location"]) == (302, PRIVATE)
    copy = urls(web, "copy")[0]
    assert fetch(copy)[2] == fetch(copy.replace("/copy/", "/emoji/"))[2]
    with pytest.raises((OSError, UnidentifiedImageError)):
        Image.open(io.BytesIO(fetch(urls(web, "truncated")[0])[2])).load()


def test_robots_forbids_the_disallowed(web):
    status, headers, body = fetch(f"{web.address}/robots.txt")
    assert (status, headers["Content-Type"]) == (200, "text/plain")
    assert b"Disallow: /disallowed/" in body


def test_a_drip_never_ends(web):
    host, port = web.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        path = urls(web, "drip")[0].removeprefix(web.address)
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        received = b""
        while len(received.partition(b"\r\n\r\n")[2]) < 10:  # the signature of a PNG, then byte by byte
            received += connection.recv(1000)
    assert b"Content-Length: 100000" in received


def test_requests_are_counted_by_path(web):
    url = urls(web, "emoji")[-1]
    path = url.removeprefix(web.address)
    before = web.requests()
    fetch(url)
    fetch(url)
    assert web.requests() - before == Counter({path: 2})


def test_unknown_paths_and_methods_are_refused(web):
    assert fetch(f"{web.address}/emoji/../../etc/passwd")[0] == 404
    assert fetch(f"{web.address}/nothing")[0] == 404
    with pytest.raises(urllib.error.HTTPError, match="405"):
        urllib.request.urlopen(urllib.request.Request(web.address, method="POST", data=b""), timeout=60)


def test_it_listens_where_it_did_the_last_time_unless_the_port_is_taken(tmp_path):
    addresses = []
    for _ in range(2):
        server = start_web(tmp_path, limit=1)
        addresses.append(server.address)
        server.stop()
    assert addresses[0] == addresses[1]
    port = int(addresses[0].rpartition(":")[2])
    with socket.create_server(("127.0.0.1", port)):
        server = start_web(tmp_path, limit=1)
        addresses.append(server.address)
        server.stop()
    assert addresses[2] != addresses[0]


def test_a_server_that_dies_is_reported(tmp_path):
    with pytest.raises(StarflowError, match="did not start"):
        start_web(tmp_path, limit=1, hazard_every=0)
