"""A kept group is shown in the order in which the learner prefers its samples."""

from __future__ import annotations

import pytest

from services.config_file import load_config
from services.report.ranking import ranked_group
from services.report.samples import GroupSample

REWARDS = "rewards=[{name: wide, app: jpeg}, {name: narrow, app: ocr}]"


@pytest.mark.parametrize(
    ("combine", "order"),
    [
        ("sum", [0, 1, 2]),
        # What is far ahead in the narrow one is ahead, though that is a hundredth of the total.
        ("normalized", [1, 0, 2]),
    ],
)
def test_it_is_ranked_as_the_learner_does(combine: str, order: list[int]) -> None:
    config = load_config("quickstart", [REWARDS, f"advantage.combine={combine}"])
    sample = GroupSample(
        ordinal=0,
        prompt="p",
        version="0.0",
        rewards={"wide": [100.0, 99.0, 0.0], "narrow": [0.0, 0.5, 0.0]},
    )
    shown = ranked_group(sample, config)
    assert shown is not None and not shown.flat
    assert [member.place for member in shown.members] == order
    advantages = [member.advantage for member in shown.members]
    assert advantages == sorted(advantages, reverse=True) and shown.members[0].best
    assert {member.place: member.total for member in shown.members} == {0: 100.0, 1: 99.5, 2: 0.0}


def test_what_differs_by_rounding_alone_has_no_best() -> None:
    config = load_config("quickstart", ["rewards=[{name: ocr, app: ocr}]"])
    sample = GroupSample(ordinal=0, prompt="p", version="0.0", rewards={"ocr": [0.3, 0.1 + 0.2]})
    shown = ranked_group(sample, config)
    assert shown is not None and shown.flat
    assert not any(member.best or member.worst or member.advantage for member in shown.members)
