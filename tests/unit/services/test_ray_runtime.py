"""Which Ray a run joins, and what it refuses there."""

from __future__ import annotations

import pytest
import ray

from services.config_file import ConfigError, load_config
from services.ray_runtime import ray_cluster

ELSEWHERE = [
    "queue.url=redis://queue.example:6379",
    "rewards=[{name: ocr, url: 'https://rewards.example/ocr'}]",
]


@pytest.mark.parametrize(
    ("nodes", "overrides", "queue", "refused"),
    [
        (1, [], True, ""),
        (2, ELSEWHERE, True, ""),
        (2, ELSEWHERE[:1], True, "reward ocr"),
        (2, ELSEWHERE[1:], True, "the queue"),
        # An evaluation.
        (2, ELSEWHERE[1:], False, ""),
        (2, [], False, "reward ocr"),
    ],
)
def test_nothing_listens_on_one_loopback_of_several_nodes(
    monkeypatch: pytest.MonkeyPatch, nodes: int, overrides: list[str], queue: bool, refused: str
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **settings: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}] * nodes + [{"Alive": False}])
    config = load_config("quickstart", ["cluster.address=ray.example:6379", *overrides])
    cluster = ray_cluster(config, queue=queue)
    if refused:
        with pytest.raises(ConfigError, match=f"2 nodes.*{refused}"), cluster:
            pass
    else:
        with cluster as own:
            assert not own
