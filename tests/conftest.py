"""Fixtures shared by the whole suite."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

import pytest

from infra.stack import LocalStack

# No test asks the metadata service of the cloud that it may run in; its answer, or its silence, would decide.
os.environ.update(AWS_EC2_METADATA_DISABLED="true", NO_GCE_CHECK="true")


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """The real local stack: S3, Postgres, Prefect server and worker, on free ports, for the whole session.

    Tests that use its store or server set `stack.state.env` in their environment themselves (monkeypatch).
    """
    local = LocalStack(tmp_path_factory.mktemp("stack"))
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
