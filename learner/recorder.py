"""Recording in the learner: the groups of a training run, or of a model that stays as it is (`dgpo record`).

Promises
- What is trained is recorded before its update is committed; a learner that goes on from a checkpoint goes on
  recording behind it, so that the recording is that of the surviving lineage.
- `UntrainedTrainer` changes no weight: every version it publishes is the model as it was loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from learner.advantages import differ, total_rewards
from learner.loop import Start
from learner.prober import Prober
from learner.update_metrics import reward_spreads, spread
from policy import load_policy
from services.codec import Group
from services.context import RunContext
from services.group_queue import Frontier
from services.messages import PolicyVersion, WeightsAnnouncement
from services.policy_store import publish
from services.recording_writer import RecordingWriter
from services.transports.base import WeightsTransport
from services.whole_file import write_whole

Record = Callable[[Sequence[Group]], None]
STATE = "recorded.json"
"""In the run directory of a `dgpo record`: what a checkpoint is for a learner that trains."""


@contextmanager
def recording(context: RunContext, start: Start) -> Iterator[Record | None]:
    """What the learner's loop records with; None for a run that does not record.

    Raises:
        RecordingError: what an earlier learner of the run recorded is damaged, or still being written.
    """
    place = context.record
    if place is None and context.config.telemetry.record:
        place = context.run_directory.groups
    if place is None:
        yield None
        return
    with RecordingWriter(place, context.config, context.run, start.frontier) as writer:
        yield writer.append


class UntrainedTrainer:
    """The trainer of `dgpo record` (learner/loop.py `Trainer`): looks at the groups and leaves the model."""

    curriculum = None
    """A model that stays as it is gives a curriculum nothing to follow (services/record.py refuses one)."""

    def __init__(self, context: RunContext, transport: WeightsTransport) -> None:
        self._context, self._transport = context, transport
        config = context.config
        self.policy = load_policy(
            config.model, text_encoders=False, vae=False, base=False, seed=config.run.seed
        )
        self._prober = Prober(self.policy, config)

    def begin(self) -> Start:
        """Behind the groups that an earlier learner has recorded."""
        try:
            found = json.loads(self._state.read_text())
        except FileNotFoundError:
            return Start()
        return Start(
            version=PolicyVersion.model_validate(found["version"]),
            frontier=Frontier.model_validate(found["frontier"]),
        )

    def update(self, groups: Sequence[Group], step: int) -> dict[str, Any]:
        """The rewards of the groups; nothing else."""
        trained = self._context.config.trained_rewards
        totals = [total_rewards(group.header.rewards, trained) for group in groups]
        of_total = spread(totals)
        return {
            "reward_mean": of_total["mean"],
            "reward_std": of_total["std"],
            "rewards": reward_spreads([group.header.rewards for group in groups]),
            "zero_variance_groups": int((~differ(torch.stack(totals))).sum()),
        }

    def publish(self, version: PolicyVersion, *, kind: str) -> WeightsAnnouncement:
        tensors = self.policy.trainable()
        probe = self._prober.of(tensors, version, kind=kind)
        dtype = getattr(torch, self._context.config.learner.publish_dtype)
        return publish(self._transport, tensors, version, kind=kind, dtype=dtype, probe=probe)

    def checkpoint(self, version: PolicyVersion, frontier: Frontier) -> None:
        state = {"version": version.model_dump(mode="json"), "frontier": frontier.model_dump(mode="json")}
        write_whole(self._state, json.dumps(state))

    def held(self) -> Iterator[torch.Tensor]:
        """Every tensor that is kept."""
        return self.policy.held()

    def finish(self) -> None:
        self._transport.close()

    def close(self) -> None:
        """Nothing is left to close."""

    @property
    def _state(self) -> Path:
        return self._context.directory / STATE
