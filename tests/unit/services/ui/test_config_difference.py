"""Two resolved configurations, key by key."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.config_file import ConfigError
from services.ui.difference import Change, differences, flat_config
from tests.unit.services.ui.made_runs import a_run
from tests.unit.services.ui.page_support import page_of, watched


def test_what_differs_between_two_runs(tmp_path: Path) -> None:
    here = flat_config(a_run(tmp_path, "objective.beta=7").root)
    there = flat_config(a_run(tmp_path, "queue.max_staleness=0").root)
    changes = {change.key: (change.here, change.there) for change in differences(here, there)}
    assert changes == {"objective.beta": ("7.0", "500.0"), "queue.max_staleness": ("1", "0")}


def test_entries_of_lists_are_known_by_their_name(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        "rewards:\n- {name: b, weight: 2.0, args: {}}\n- {name: a, weight: 1.0}\nlist: [1, 2]\nnone: null\n"
    )
    assert flat_config(tmp_path) == {
        "rewards.b.name": "b",
        "rewards.b.weight": "2.0",
        "rewards.b.args": "{}",
        "rewards.a.name": "a",
        "rewards.a.weight": "1.0",
        "list": "[1, 2]",
        "none": "null",
    }


def test_added_and_removed_keys() -> None:
    assert differences({"a": "1", "b": "2"}, {"b": "2", "c": "3"}) == [
        Change("a", "added", here="1"),
        Change("c", "removed", there="3"),
    ]


def test_credentials_are_blanked(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("queue: {url: 'redis://me:secret@host/0'}\n")
    assert flat_config(tmp_path) == {"queue.url": "redis://***@host/0"}


@pytest.mark.parametrize("text", ["a: [", "just text", "- 1"])
def test_what_is_no_configuration_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        flat_config(tmp_path)


async def test_only_runs_that_were_named_are_compared_with(tmp_path: Path) -> None:
    run, other = a_run(tmp_path), a_run(tmp_path, "run.seed=9")
    async with watched(run) as watch, page_of(watch, compare={other.name: other.root}) as client:
        assert (await client.get("/api/config")).json()["others"] == [other.name]
        found = (await client.get("/api/config", params={"against": other.name})).json()
        assert found["changes"] == [{"key": "run.seed", "kind": "changed", "here": "0", "there": "9"}]
        for wrong in (str(other.root), "../x", "none"):
            assert (await client.get("/api/config", params={"against": wrong})).status_code == 404
        other.config_file.unlink()
        found = (await client.get("/api/config", params={"against": other.name})).json()
        assert other.name in found["problem"]
