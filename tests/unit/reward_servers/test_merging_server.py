"""A server at an address is asked whether its scores depend on what else it scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from services.config_file import ConfigError, load_config
from services.driver import reward_places
from services.run_directory import RunDirectory
from tests.unit.reward_servers.fake_scorer import FakeScorer


@pytest.mark.parametrize(
    ("invariant", "server", "accepted", "refused"),
    [
        (False, "dynamic", "request", True),
        (False, "dynamic", "dynamic", False),
        (False, "request", "request", False),
        (True, "dynamic", "request", False),
    ],
)
def test_a_server_whose_scores_depend_on_its_other_requests_is_refused(
    serve_fake: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    token: str,
    tmp_path: Path,
    invariant: bool,
    server: str,
    accepted: str,
    refused: bool,
) -> None:
    monkeypatch.setattr(FakeScorer, "batch_invariant", invariant)
    monkeypatch.setenv("DGPO_TEST_TOKEN", token)
    url = serve_fake(batching=server)
    reward = f"{{name: ocr, url: '{url}', token_env: DGPO_TEST_TOKEN, batching: {accepted}}}"
    config = load_config("quickstart", [f"rewards=[{reward}]"])
    places = reward_places(config, RunDirectory(tmp_path), own_ray=True)
    if refused:
        with pytest.raises(ConfigError, match="merges requests"), places:
            pass
    else:
        with places as found:
            assert found["ocr"].url == url
