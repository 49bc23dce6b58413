"""An update from recorded groups is the update from the groups themselves, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toy_policy import ToyPolicy, toy_config, training_groups

from learner.trainer import training_group
from learner.update import Updater
from services.codec import Group, decode_group, encode_group
from services.messages import GroupHeader, PolicyVersion, Prompt
from services.recording import Recording
from services.recording_writer import RecordingWriter


def live_group(ordinal: int) -> Group:
    """As the learner takes it from the queue."""
    (made,) = training_groups(1, seed=ordinal)
    header = GroupHeader(
        run="live",
        ordinal=ordinal,
        attempt=1,
        version=PolicyVersion(epoch=0, step=ordinal // 2),
        prompt=Prompt(text=f"prompt {ordinal}"),
        seeds=(1, 2, 3, 4),
        rewards={"ocr": tuple(made.rewards["ocr"])},
        worker="rollout-0",
        sample_s=0.1,
        reward_s=0.1,
    )
    tensors = {"latents": made.latents, "condition.text": made.condition["text"]}
    sent = encode_group(header, tensors)
    return decode_group(sent.header, sent.payload, sent.sha256, group_id=f"live-{ordinal}")


@pytest.mark.parametrize("reference", ["ema", "frozen"])
def test_recorded_and_live_groups_give_the_same_weights(tmp_path: Path, reference: str) -> None:
    config = toy_config(objective={"reference": reference, "kl": 0.1})
    updates = [[live_group(2 * step), live_group(2 * step + 1)] for step in range(3)]
    live = Updater(ToyPolicy(torch.float32), config)
    with RecordingWriter(tmp_path, config, "live") as writer:
        for step, groups in enumerate(updates):
            writer.append(groups)
            live.step([training_group(one) for one in groups], step)
    recording = Recording.open(tmp_path)
    again = Updater(ToyPolicy(torch.float32), config)
    for step in range(3):
        again.step([training_group(recording.read(2 * step + place)) for place in range(2)], step)
    for part, tensors in live.state().items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, again.state()[part][name]), f"{part} {name}"
