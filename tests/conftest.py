"""Fixtures shared by the whole suite."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from infra.services import Service
from infra.stack import LocalStack

# No test asks the metadata service of the cloud that it may run in; its answer, or its silence, would decide.
os.environ.update(AWS_EC2_METADATA_DISABLED="true", NO_GCE_CHECK="true")
# A busy machine takes longer than usual to start Ray, and to try an example.
os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")
settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """Each test draws from torch's own generator what it drew the last time; nobody loads torch for this."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """The real local stack: S3, Postgres, Prefect server and worker, on free ports, for the whole session.

    Tests that use its store or server set `stack.state.env` in their environment themselves (monkeypatch).
    """
    local = LocalStack(tmp_path_factory.mktemp("stack"))
    with pytest.MonkeyPatch.context() as patch:
        for kind in Service.__subclasses__():
            patch.setattr(kind, "start_seconds", 600.0)  # for a busy machine
        try:
            local.up()
            yield local
        finally:
            local.down()


@pytest.fixture
def s3_url(stack: LocalStack, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh prefix on the stack's S3 server, whose credentials are in the environment of the test."""
    for name, value in stack.state.env.items():
        monkeypatch.setenv(name, value)
    return f"{stack.state.store}/{uuid.uuid4().hex}"
