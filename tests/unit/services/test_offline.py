"""What contradicts a recording is refused with every reason; an ordinal's group follows from the seed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from services.codec import Group
from services.config_file import ConfigError
from services.demands import reserved
from services.doctor import examine
from services.offline import differences, open_recording, place_of
from services.prompts import evaluates, prompt_source
from services.ray_runtime import loopback_parts
from services.record import record_groups, recorder_config
from services.recording import INDEX, RecordingError
from tests.recorded_groups import config, group, record


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    return record(tmp_path / "recording", [group(ordinal) for ordinal in range(6)])


def offline(place: Path, *overrides: str):  # type: ignore[no-untyped-def]
    return config("prompts.source=recorded", f"prompts.path={place}", *overrides)


def test_every_pass_goes_through_all_and_later_ones_in_an_order_of_the_seed() -> None:
    passes = [[place_of(0, 50 * turn + at, 50) for at in range(50)] for turn in range(3)]
    assert passes[0] == list(range(50))
    assert [sorted(one) for one in passes] == [list(range(50))] * 3
    assert passes[1] != passes[2] != passes[0]
    assert passes[1] == [place_of(0, 50 + at, 50) for at in range(50)]
    assert passes[1] != [place_of(1, 50 + at, 50) for at in range(50)]


def test_prompts_are_those_recorded_and_held_out_words_are_not(recorded: Path) -> None:
    source = prompt_source(offline(recorded))
    assert [source.training(0, ordinal).text for ordinal in range(6)] == [f"prompt {n}" for n in range(6)]
    words = prompt_source(config())
    assert source.heldout(99, 8) == words.heldout(99, 8)


def test_a_recording_of_a_file_is_evaluated_on_eval_path_or_not_at_all(tmp_path: Path) -> None:
    made_by = config("prompts.source=file", "prompts.path=prompts.txt")
    recorded = record(tmp_path / "recording", [group(ordinal) for ordinal in range(2)], made_by)
    assert not evaluates(offline(recorded))
    assert loopback_parts(offline(recorded)) == ["the queue"]
    heldout = tmp_path / "heldout.txt"
    heldout.write_text("one\ntwo\n")
    with_path = offline(recorded, f"eval.path={heldout}")
    assert evaluates(with_path)
    assert loopback_parts(with_path) == ["the queue", "reward ocr"]
    heldout.write_text("one\nprompt 1\n")
    with pytest.raises(ConfigError, match=r"1 prompts are also in .*recording, for example 'prompt 1'"):
        evaluates(with_path)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["rollout.group_size=8"], "rollout.group_size is 8, its groups have 4 samples"),
        (["model.height=64"], r"64 x 64, its images 32 x 64: latents of shape \(4, 8, 16\)"),
        (["learner.groups_per_step=7"], "groups_per_step is 7, it has 6 groups"),
        (
            ["rollout.solver=euler", "rollout.sigmas=fractions"],
            "rollout.sigmas is 'fractions', its groups were sampled with 'scheduler'",
        ),
        (
            ["rewards=[{name: ocr, app: ocr}, {name: aesthetic, app: ocr}]"],
            "reward 'aesthetic' is missing from 6 of 6 groups, first ordinal 0; recorded: ocr",
        ),
        (
            ["rewards=[{name: ocr, app: ocr}, {name: aesthetic, app: ocr, required: false}]"],
            "reward 'aesthetic' is missing from 6 of 6 groups",
        ),
        (
            [
                "objective={name: flow_grpo, timesteps: {first: 9, per_update: 2}}",
                "rollout.solver=sde",
            ],
            "objective 'flow_grpo' needs the trajectories and likelihoods of solver 'sde'",
        ),
    ],
)
def test_a_contradiction_is_refused_with_its_reason(
    recorded: Path, overrides: list[str], reason: str
) -> None:
    with pytest.raises(RecordingError, match=reason):
        open_recording(offline(recorded, *overrides))


def test_all_contradictions_are_named_at_once(recorded: Path) -> None:
    with pytest.raises(RecordingError) as caught:
        open_recording(offline(recorded, "rollout.group_size=8", "model.width=128"))
    assert "rollout.group_size" in str(caught.value)
    assert "model.height and width" in str(caught.value)


def test_trajectories_of_other_steps_are_refused(tmp_path: Path) -> None:
    objective = ["objective={name: flow_grpo, timesteps: {first: 3, per_update: 2}}", "rollout.solver=sde"]
    made_by = config(*objective, "rollout.steps=5")

    def with_trajectory(ordinal: int) -> Group:
        made = group(ordinal)
        extra = {"trajectory": torch.zeros(4, 6, 4, 8, 16), "log_likelihoods": torch.zeros(4, 5)}
        return Group(made.header, made.tensors | extra)

    recorded = record(tmp_path / "recording", [with_trajectory(n) for n in range(2)], made_by)
    assert len(open_recording(offline(recorded, *objective, "rollout.steps=5"))) == 2
    with pytest.raises(RecordingError, match=r"rollout\.steps is 6, the recorded likelihoods are those of 5"):
        open_recording(offline(recorded, *objective, "rollout.steps=6"))
    with pytest.raises(RecordingError, match=r"rollout\.terminal is 0\.02, the recorded .* those of None"):
        open_recording(offline(recorded, *objective, "rollout.steps=5", "rollout.terminal=0.02"))


def test_a_recording_of_format_1_is_read_and_says_nothing_of_sigmas(recorded: Path) -> None:
    index = recorded / INDEX
    first, rest = index.read_text().split("\n", 1)
    facts = json.loads(first) | {"format": 1}
    index.write_text(
        json.dumps({k: v for k, v in facts.items() if k not in ("sigmas", "terminal")}) + "\n" + rest
    )
    of_flux = offline(recorded, "rollout.solver=euler", "rollout.sigmas=fractions", "rollout.terminal=0.02")
    found = open_recording(of_flux)
    assert len(found) == 6
    assert [told.split(":")[0] for told in differences(of_flux, found.facts)] == ["rollout.solver"]


def test_an_optional_reward_may_be_absent_from_some_groups(tmp_path: Path) -> None:
    scores = group(0).header.rewards["ocr"]
    groups = [
        group(0),
        group(1, rewards={"ocr": scores, "style": scores}),
        group(2, rewards={"style": scores}),
    ]
    recorded = record(tmp_path / "recording", groups)
    with pytest.raises(RecordingError, match="'ocr' is missing from 1 of 3 groups, first ordinal 2"):
        open_recording(offline(recorded))
    optional = "{name: ocr, app: ocr, required: false}"
    with pytest.raises(RecordingError, match="1 groups, first ordinal 2, have no score of any"):
        open_recording(offline(recorded, f"rewards=[{optional}]"))
    both = f"rewards=[{optional}, {{name: style, app: ocr, required: false}}]"
    assert len(open_recording(offline(recorded, both))) == 3


def test_doctor_knows_recordings(recorded: Path) -> None:
    found = {finding.what: finding for finding in examine(offline(recorded, "learner.max_steps=6"))}
    assert found["recording"].ok
    assert "6 groups of 4 by recorded-run" in found["recording"].found
    assert "passed through 2.0 times" in found["recording"].found
    other = {f.what: f for f in examine(offline(recorded, "rollout.steps=20"))}["recording"]
    assert other.ok
    assert "rollout.steps: recorded with 10, now 20" in other.found
    missing = {f.what: f for f in examine(offline(recorded / "no"))}["recording"]
    assert not missing.ok
    assert "dgpo record" in missing.remedy


def test_the_configuration_says_what_cannot_be(recorded: Path) -> None:
    with pytest.raises(ConfigError, match="source 'recorded' needs a path"):
        config("prompts.source=recorded")
    with pytest.raises(ConfigError, match="would record the recording"):
        offline(recorded, "telemetry.record=true")
    assert reserved(offline(recorded, "rollout.workers=9"), "num_cpus") == reserved(
        offline(recorded), "num_cpus"
    )


@pytest.mark.parametrize(
    ("groups", "per_step", "steps"), [(8, 2, 4), (7, 1, 7), (1, 1, 1), (9, 1, 9), (16, 2, 8)]
)
def test_a_recorder_makes_exactly_the_groups_asked_for(groups: int, per_step: int, steps: int) -> None:
    own = recorder_config(config("rollout.workers=3", "queue.max_groups=4"), groups)
    assert (own.learner.groups_per_step, own.learner.max_steps) == (per_step, steps)
    window = (own.queue.max_staleness + 1) * per_step
    assert 2 * 3 <= window <= own.queue.max_groups


def test_a_recorder_of_one_rank_and_of_turns_has_settings_that_go_together() -> None:
    spread = recorder_config(config("learner.ranks=2", "learner.placement=spread"), 4)
    assert (spread.learner.ranks, spread.learner.placement) == (1, "pack")
    turns = ("cluster.colocate=true", "queue.max_staleness=0", "rollout.workers=1")
    assert recorder_config(config(*turns), 4).queue.max_staleness == 0


def test_a_recorder_refuses_before_it_starts(recorded: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a recording already"):
        record_groups(offline(recorded), 2, tmp_path / "out", None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="exists and is not an empty directory"):
        record_groups(config(), 2, recorded, None)  # type: ignore[arg-type]
