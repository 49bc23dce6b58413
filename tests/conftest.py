"""What all tests share: one Valkey server a session, a run of its own for each test."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from services.embedded import EmbeddedValkey

torch.set_num_threads(1)
# How long an example takes says more about the machine than about the code.
settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    """A real queue server on loopback."""
    directory: Path = tmp_path_factory.mktemp("valkey")
    with EmbeddedValkey(directory) as server:
        yield server


@pytest.fixture
def run_name() -> str:
    """Tests share the server, never a run."""
    return f"test-{uuid.uuid4().hex[:12]}"
