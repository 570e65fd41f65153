"""A server on the loopback interface that speaks the clouds' protocols, as their documentation gives them."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.error import HTTPError

import pytest

from tests.training.run_helpers import until
from training import spot
from training.crew import End
from training.events import read_events
from training.spot import FIRST_QUESTIONS, aws_notice, clouds, gcp_notice, watch_notices
from training.supervisor import Supervisor

ACTION = {"action": "terminate", "time": "2026-01-02T03:04:05Z"}


class Cloud(BaseHTTPRequestHandler):
    """`aws`, `gcp`: the body of the notice; empty for none planned; None where this is another cloud."""

    aws: str | None = None
    gcp: str | None = None
    asked: ClassVar[list[str]]

    def log_message(self, *_):
        """Says nothing."""

    def reply(self, status, body=""):
        self.asked.append(self.path)  # now that the answer is settled
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def do_PUT(self):
        right = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self.reply(200, "a-token") if right and self.aws is not None else self.reply(404)

    def do_GET(self):
        if self.path == "/latest/meta-data/spot/instance-action" and self.aws is not None:
            known = self.headers["X-aws-ec2-metadata-token"] == "a-token"
            self.reply((200 if self.aws else 404) if known else 401, self.aws if known else "")
        elif self.path == "/computeMetadata/v1/instance/preempted" and self.gcp is not None:
            known = self.headers["Metadata-Flavor"] == "Google"
            self.reply(200 if known else 403, self.gcp if known else "")
        else:
            self.reply(404)


@pytest.fixture
def cloud(monkeypatch):
    class Mine(Cloud):
        asked: ClassVar[list[str]] = []

    server = ThreadingHTTPServer(("127.0.0.1", 0), Mine)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    address = f"127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://{address}/")
    monkeypatch.setenv("GCE_METADATA_HOST", address)
    for name in ("AWS_EC2_METADATA_DISABLED", "NO_GCE_CHECK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # a link-local address is not for a proxy
    monkeypatch.setattr(spot, "ASK_EVERY", 0.05)
    monkeypatch.setattr(spot, "PATIENCE", 30.0)  # who has not answered by then is taken to be absent
    yield Mine
    server.shutdown()
    server.server_close()


def test_aws(cloud):
    cloud.aws = ""
    assert aws_notice() == ""
    cloud.aws = json.dumps(ACTION)
    assert aws_notice() == "AWS will terminate this machine at 2026-01-02T03:04:05Z"
    cloud.aws = None
    with pytest.raises(HTTPError):
        aws_notice()


def test_google(cloud):
    cloud.gcp = "FALSE"
    assert gcp_notice() == ""
    cloud.gcp = "TRUE\n"
    assert gcp_notice() == "Google Cloud is preempting this machine"
    cloud.gcp = None
    with pytest.raises(HTTPError):
        gcp_notice()


def test_services_can_be_disabled():
    assert clouds({}) == [aws_notice, gcp_notice]
    assert clouds({"AWS_EC2_METADATA_DISABLED": "true", "NO_GCE_CHECK": "false"}) == [gcp_notice]
    assert clouds({"AWS_EC2_METADATA_DISABLED": "True", "NO_GCE_CHECK": "1"}) == []


def test_the_first_notice_is_told_once_after_answers_that_say_nothing(cloud):
    told = []
    cloud.gcp = "FALSE"
    with watch_notices(told.append):
        until(lambda: len(cloud.asked) > 4, 60)
        assert told == []
        assert cloud.asked.count("/latest/api/token") == 1  # this is no AWS machine
        cloud.gcp = "TRUE"
        until(lambda: told, 60)
    assert told == ["Google Cloud is preempting this machine"]


def test_no_cloud_is_asked_a_few_times(cloud):
    with watch_notices(lambda notice: pytest.fail(notice)):
        until(lambda: len(cloud.asked) == 2 * FIRST_QUESTIONS, 60)
        cloud.aws, cloud.gcp = json.dumps(ACTION), "TRUE"
        until(lambda: all(thread.name != "spot" for thread in threading.enumerate()), 60)
    assert len(cloud.asked) == 2 * FIRST_QUESTIONS


def test_a_first_question_that_gets_no_answer_is_asked_again(monkeypatch):
    told, answers = [], [None, None, "", "", "this machine goes"]
    monkeypatch.setattr(spot, "clouds", lambda: [object()])
    monkeypatch.setattr(spot, "_heard", lambda ask: answers.pop(0))
    monkeypatch.setattr(spot, "ASK_EVERY", 0.01)
    with watch_notices(told.append):
        until(lambda: told, 60)
    assert (told, answers) == (["this machine goes"], [])


def test_a_notice_is_a_request_to_stop(cloud, make_config, store, monkeypatch):
    """The supervisor leaves as after SIGTERM, and says why."""

    def ranks(self, news, look):
        until(self._stop.is_set, 60)
        return End("preempted", "saved and stopped as asked")

    monkeypatch.setattr(Supervisor, "_launch", ranks)
    cloud.aws = ""
    leaving = Supervisor(make_config())
    threading.Timer(0.3, setattr, (cloud, "aws", json.dumps(ACTION))).start()
    assert leaving.run() == "preempted"
    last = read_events(store, "test")[-1]
    assert last["kind"] == "preempted"
    assert last["message"] == "saved and stopped as asked (AWS will terminate this machine at 2026-01-02T03:04:05Z)"
