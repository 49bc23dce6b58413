"""A queue server with the users of deploy/redis, and a run of its own for each test."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
from acl_server import AclServer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AclServer]:
    with AclServer(tmp_path_factory.mktemp("acl")) as started:
        yield started


@pytest.fixture
def run() -> str:
    return f"acl-{uuid.uuid4().hex[:12]}"
