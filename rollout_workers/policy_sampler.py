"""The real sampler: a policy with its text encoders and VAE, and the weights it installs.

Promises
- The prompt is encoded once a group, or found encoded; its condition travels with the group, so the learner
  holds no encoder.
- An install binds every published tensor, or raises; with a probe it also raises where this process computes
  another velocity with them than their publisher.
"""

from __future__ import annotations

import random
import socket
from pathlib import Path

from policy import Policy, load_policy
from policy.loading import find_device
from policy.one_order import add_up_in_one_order, wants_one_order
from policy.probe import check_probe
from rollout_workers.loop import SampledGroup
from rollout_workers.sampling import sample_trajectory
from services.conditions import condition_cache, upcoming
from services.config import Config
from services.messages import GroupTask, WeightsAnnouncement
from services.policy_store import install
from services.prompts import prompt_source
from services.transports.base import WeightsTransport

AHEAD = 256
"""Groups whose prompts are encoded when one is missing in the cache: loading the encoders takes so long."""


class PolicySampler:
    """Samples groups with the newest installed weights.

    Args:
        config: of the run.
        run_directory: where weights are found when the process that published them is gone.
    """

    def __init__(self, config: Config, run_directory: Path, transport: WeightsTransport) -> None:
        self._config = config
        self._run_directory = run_directory
        self._transport = transport
        if wants_one_order(config, find_device(config.model.device)):
            add_up_in_one_order(warn_only=True)
        cache = condition_cache(config, run_directory)
        self.policy: Policy = load_policy(
            config.model,
            text_encoders=True,
            vae=True,
            base=False,
            seed=config.run.seed,
            condition_cache=cache,
        )
        self._source = None if cache is None else prompt_source(config)

    def install(self, announcement: WeightsAnnouncement) -> float | None:
        """Fetch, verify and bind; returns the error of the velocity probe, None where there is none.

        Raises:
            WeightsMismatch: the digest differs, or names and shapes are not exactly those of the policy.
            VelocityDrift: the velocity differs from the publisher's by more than `rollout.probe_tolerance`.
        """
        install(self._transport, announcement, self.policy.trainable(), self._run_directory)
        if announcement.probe is None:
            return None
        return check_probe(
            self.policy,
            announcement.probe,
            tolerance=self._config.rollout.probe_tolerance,
            weights=f"weights {announcement.kind} {announcement.version}",
            here=f"node {socket.gethostname()}",
        )

    def sample(self, task: GroupTask) -> SampledGroup:
        """The group of a task: latents (G, C, h, w), condition of one sample, images (G, H, W, 3)."""
        rollout = self._config.rollout
        if self._source is not None and not self.policy.prepared(task.prompt.text):
            texts = list(upcoming(self._config, self._source, task.place, AHEAD))
            # Workers that miss the same prompts at once share them so, each its own part first.
            random.shuffle(texts)
            self.policy.prepare([task.prompt.text, *texts], negative=rollout.guidance > 1)
        condition = self.policy.encode(task.prompt.text)
        negative = self.policy.negative() if rollout.guidance > 1 else None
        latents, trajectory = sample_trajectory(self.policy, condition, negative, task.seeds, rollout)
        images = self.policy.decode(latents, batch=rollout.decode_batch)
        tensors = {"latents": latents.contiguous()}
        if self._config.objective.needs_trajectory:
            assert trajectory is not None  # Config refuses such an objective with another solver
            tensors["trajectory"] = trajectory.points.contiguous()
            tensors["log_likelihoods"] = trajectory.log_likelihoods.contiguous()
        tensors |= {f"condition.{name}": tensor.contiguous() for name, tensor in condition.items()}
        return SampledGroup(tensors=tensors, images=images)
