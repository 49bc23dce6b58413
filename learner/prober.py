"""What the learner announces beside weights, so that workers can tell that they compute as it does.

Promises
- The first weights of each kind in an epoch carry a probe (policy/probe.py), then those of every
  `learner.probe_every`-th update.
- It is computed with the tensors that are published, which are the reference's where rollouts sample with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from policy import Policy, PolicyError
from policy.probe import probe
from services.config import Config
from services.messages import PolicyVersion


class Prober:
    """Makes the probes of one learner."""

    def __init__(self, policy: Policy, config: Config) -> None:
        self._policy = policy
        self._every = config.learner.probe_every
        # A run from a recording samples nothing: nobody installs what it publishes for rollouts.
        self._kinds = {"ema"} if config.offline else {"policy", "ema"}
        self._begun: set[tuple[int, str]] = set()

    def of(
        self, tensors: Mapping[str, Tensor], version: PolicyVersion, *, kind: str
    ) -> tuple[float, ...] | None:
        """The probe of weights about to be published; None where none is due.

        Raises:
            PolicyError: the velocity is not finite.
        """
        if not self._every or kind not in self._kinds:
            return None
        first = (version.epoch, kind) not in self._begun
        if not first and version.step % self._every:
            return None
        self._begun.add((version.epoch, kind))
        found = probe(self._policy, tensors)
        if not all(map(math.isfinite, found)):
            raise PolicyError(
                f"weights {kind} {version}: the model's velocity is not finite: training has diverged, or "
                f"{self._policy.config.dtype} overflows; lower learner.learning_rate or objective.beta, or "
                "resume from an earlier checkpoint"
            )
        return found
