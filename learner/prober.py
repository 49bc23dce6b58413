"""What the learner announces beside weights, so that workers can tell that they compute as it does.

Promises
- The first weights of each kind in an epoch carry a probe (policy/probe.py), then those of every
  `learner.probe_every`-th update.
- It is computed with the tensors that are published, which are the reference's where rollouts sample with it,
  rounded to what they travel in (learner.publish_dtype).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from policy import Policy, PolicyError
from policy.probe import probe
from services.config import Config
from services.messages import PolicyVersion


class Prober:
    """Makes the probes of one learner, or says when all of its ranks make one."""

    def __init__(self, policy: Policy, config: Config) -> None:
        self._policy, self._config = policy, config
        self._every = config.learner.probe_every
        # A run from a recording samples nothing: nobody installs what it publishes for rollouts.
        self._kinds = {"ema"} if config.offline else {"policy", "ema"}
        self._begun: set[tuple[int, str]] = set()

    def due(self, version: PolicyVersion, *, kind: str) -> bool:
        """Whether weights about to be published get a probe; asked once for each."""
        if not self._every or kind not in self._kinds:
            return False
        first = (version.epoch, kind) not in self._begun
        self._begun.add((version.epoch, kind))
        return first or version.step % self._every == 0

    def of(
        self, tensors: Mapping[str, Tensor], version: PolicyVersion, *, kind: str
    ) -> tuple[float, ...] | None:
        """The probe of weights about to be published, see `probe_published`; None where none is due."""
        if not self.due(version, kind=kind):
            return None
        return probe_published(self._policy, tensors, self._config, f"{kind} {version}")


def probe_published(
    policy: Policy, tensors: Mapping[str, Tensor], config: Config, weights: str
) -> tuple[float, ...]:
    """The probe of tensors as they are published.

    Args:
        tensors: on the policy's device; with weights in shards, this rank's rows, and all ranks call it.
        weights: which they are, for the error.

    Raises:
        PolicyError: the velocity is not finite.
    """
    dtype = getattr(torch, config.learner.publish_dtype)
    # Back again: weights in shards change places with these, which must not round them.
    rounded = {name: tensor.detach().to(dtype).to(tensor.dtype) for name, tensor in tensors.items()}
    found = probe(policy, rounded)
    if not all(map(math.isfinite, found)):
        raise PolicyError(
            f"weights {weights}: the model's velocity is not finite: training has diverged, or "
            f"{config.model.dtype} overflows; lower learner.learning_rate or objective.beta, or resume from "
            "an earlier checkpoint"
        )
    return found
