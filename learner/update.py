"""One update: from whole groups to a new policy version.

Promises
- A pure function of (weights, optimizer, EMAs, groups, step): noise and timesteps follow from the run seed,
  the step and the ordinals, never from the order of the groups, the process or the epoch. On one machine
  type and thread count the result is bit-identical.
- A group without a preference (all total rewards equal) adds no gradient, not even of the KL, and does not
  change the scale of the others.
- Ranks that train an update together make the same optimizer steps on the same gradient, which is one rank's
  up to the order in which its terms are added.

Imports neither Ray nor Redis: the training loop calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from learner.activations import offloaded
from learner.advantages import Advantages, group_advantages, preferences, total_rewards
from learner.micro_batch import agreed_micro_batch
from learner.objectives.base import Idle, LiveGroup, Measurements, Phases, TrainingGroup, make_objective
from learner.optimizer import learning_rate
from learner.ranks import Order, Ranks
from learner.shares import RatedGroup, Share, hand_out, most_passes, sum_gradients, sum_measurements
from learner.timesteps import configured_window, training_timesteps
from learner.trained import State, Trained, UpdateError
from learner.update_metrics import UpdateMetrics, dropped_terms, reward_spreads, spread
from policy.base import Condition, Policy
from policy.schedule import make_schedule
from services.config import Config
from services.safetensors_layout import pack

__all__ = ["State", "TrainingGroup", "UpdateError", "UpdateMetrics", "Updater", "learning_rate"]


class Passes(NamedTuple):
    """What is compared with one reference."""

    sampled_at: int | None
    """Of the groups, where that determines the reference; None: it is the one of now."""
    groups: Sequence[LiveGroup]
    idle: Idle | None


class Updater:
    """Makes updates of one policy.

    Args:
        policy: with its trained parameters; from here on only this object writes to them.
        config: of the run.
        ranks: those that make every update together; None: this process makes it alone.
    """

    def __init__(self, policy: Policy, config: Config, ranks: Ranks | None = None) -> None:
        self.policy = policy
        self._ranks = ranks
        self.config = config
        if config.learner.gradient_checkpointing:
            policy.checkpoint_gradients()
        self._schedule = make_schedule(config.rollout)
        self.objective = make_objective(policy, config, self._schedule)
        self._window = configured_window(config)
        self.trained = Trained(policy, config, ranks, uses_reference=self.objective.uses_reference)

    def step(self, groups: Sequence[TrainingGroup], step: int) -> UpdateMetrics:
        """Train on whole groups. Of several ranks it is rank 0 that has them; the others `follow`.

        Args:
            groups: those of this update, in any order.
            step: the update, from 0: updates made before it.

        Raises:
            ValueError: the groups are not what the configuration promises.
            UpdateError: the gradient is not finite.
        """
        phases = Phases()
        ordered = self._checked(groups)
        advantages = self._advantages(ordered)
        if self.objective.micro_batch is None:
            condition = self.policy.longest(ordered[0].condition)
            if self._ranks is not None:
                self._ranks.order_all(Order(do="fit"), payload=pack(condition))
            self.fit(condition)
        rated = [
            RatedGroup(group, values)
            for group, values, live in zip(ordered, advantages.values, advantages.live.tolist(), strict=True)
            if live
        ]
        share = Share(step, len(ordered), len(rated), rated)
        if self._ranks is not None:
            with phases("ranks"):
                share = hand_out(self._ranks, share, idle=self.policy.shards is not None)
        measured, norms = self._train(share, phases)
        if self._ranks is not None:
            self._ranks.settled()
        return self._report(
            ordered, advantages, measured, norms, learning_rate(self.config.learner, step), phases
        )

    def keep_to(self, micro_batch: int) -> None:
        """Settle the micro-batch of `auto`: what a former learner of the run found, or another rank has. With
        another one sums would be added up in another order."""
        self.objective.micro_batch = micro_batch

    def fit(self, condition: Condition) -> None:
        """Settle the micro-batch of `auto`, on every rank: the largest that fits all of them.

        Args:
            condition: of a prompt as long as any.

        Raises:
            UpdateError: on every rank: one of them has no memory for one sample.
        """
        reference = self.trained.reference
        found = agreed_micro_batch(
            self._ranks,
            self.objective,
            condition=condition,
            timestep=self._window[0],
            reference=None if reference is None else reference.tensors,
            activations=self._activations,
        )
        self.objective.micro_batch = found
        if found is None:
            raise UpdateError(
                "learner.micro_batch auto: there is no memory for a single sample; set "
                "learner.gradient_checkpointing to true, model.dtype to bfloat16, or see docs/memory.md"
            )

    def follow(self, share: Share) -> None:
        """Train on what rank 0 has handed to this rank."""
        self._train(share, Phases())

    def _train(self, share: Share, phases: Phases) -> tuple[Measurements, list[Tensor]]:
        """Every optimizer step of an update; returns what all ranks have measured, and the gradient norms."""
        learner, step = self.config.learner, share.step
        self.objective.phases = phases
        live = self._live(share.rated)
        measured, norms = Measurements(), []
        parts = training_timesteps(
            self.config.objective.timesteps,
            self._window,
            seed=self.config.run.seed,
            step=step,
            optimizer_steps=learner.optimizer_steps,
        )
        # Without any preference there is nothing to learn: momentum and weight decay must not act alone.
        if share.live:
            passes = self._passes(live, share)
            for part in parts:
                self.trained.optimizer.zero_grad(set_to_none=True)
                self._gradient(partial(self._accumulate, passes, part, share, measured), step, phases)
                with phases("optimizer"):
                    norms.append(self.trained.optimize(learning_rate(learner, step), step))
        self.trained.optimizer.zero_grad(set_to_none=True)
        with phases("ema"):
            self.trained.fold(step)
        if self._ranks is not None:
            with phases("ranks"):
                measured = sum_measurements(self._ranks, f"the end of update {step}", measured)
        return measured, norms

    def _gradient(self, accumulate: Callable[[], None], step: int, phases: Phases) -> None:
        """That of all ranks, in `.grad`; of shards, their part of it."""
        what = f"the gradient of update {step}"
        if self._ranks is None:
            accumulate()
        elif self.policy.shards is not None:
            with self._ranks.meeting(what):
                accumulate()
            self.policy.shards.take_gradients()
        else:
            waited_s = self._ranks.waited_s
            sum_gradients(self._ranks, what, list(self.trained.parameters.values()), accumulate)
            phases.seconds["ranks"] += self._ranks.waited_s - waited_s

    def _accumulate(
        self, passes: Sequence[Passes], part: Sequence[int], share: Share, measured: Measurements
    ) -> None:
        """Add the gradient of one optimizer step to `.grad`."""
        for key, groups, idle in passes:
            past = None if key is None else self.trained.past.before(share.step - key)
            reference = self.trained.reference_now() if past is None else past
            with self._activations():
                gained = self.objective.accumulate(
                    groups,
                    part,
                    step=share.step,
                    scale=1 / (share.groups * len(part)),
                    reference=reference,
                    idle=idle,
                )
            measured.add(gained.pairs, **gained.sums)

    def ema_tensors(self) -> dict[str, Tensor]:
        """The EMA that is evaluated and exported. Live tensors: read them before the next update."""
        return dict(self.trained.ema.tensors)

    def rollout_tensors(self, step: int) -> dict[str, Tensor]:
        """What rollout workers sample with after `step` updates: the policy, or the EMA reference.

        Live tensors: read them before the next update.
        """
        reference = self.trained.reference
        if reference is not None and self.config.objective.samples_with_reference(step):
            return dict(reference.tensors)
        return {name: parameter.detach() for name, parameter in self.trained.parameters.items()}

    def published(self, kind: str, step: int) -> dict[str, Tensor]:
        """What others get to see after `step` updates: `policy`, to sample with, or `ema`, to evaluate."""
        return self.ema_tensors() if kind == "ema" else self.rollout_tensors(step)

    def state(self) -> State:
        """See learner/trained.py `Trained.state`."""
        return self.trained.state()

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """See learner/trained.py `Trained.load`."""
        self.trained.load(state)

    def take_from_rank_0(self) -> None:
        """Continue, on every rank, from the state of rank 0, and with its micro-batch."""
        assert self._ranks is not None
        self.trained.take_from_rank_0()
        own = str(self.objective.micro_batch or 0).encode()
        micro_batch = int(self._ranks.exchange("the micro-batch of rank 0", lambda: own)[0])
        if micro_batch:
            self.keep_to(micro_batch)

    def _activations(self) -> AbstractContextManager[None]:
        if not self.config.learner.activation_offload:
            return nullcontext()
        model, shards = self.policy.transformer, self.policy.shards
        if shards is None:
            return offloaded([*model.parameters(), *model.buffers()])
        return offloaded(model.buffers(), shards.gathered)

    def _checked(self, groups: Sequence[TrainingGroup]) -> list[TrainingGroup]:
        size, steps, shape = self.config.rollout.group_size, len(self._schedule), self.policy.latent_shape()
        expected: dict[str, tuple[int, ...]] = {"latents": (size, *shape)}
        if self.config.objective.needs_trajectory:
            expected |= {"trajectory": (size, steps, *shape), "log_likelihoods": (size, steps - 1)}
        for group in groups:
            for name, wanted in expected.items():
                tensor = getattr(group, name)
                found = None if tensor is None else tuple(tensor.shape)
                if found != wanted:
                    raise ValueError(
                        f"group {group.ordinal}: {name} are {found or 'absent'}, expected {wanted}; it was "
                        "sampled with another configuration"
                    )
        ordinals = sorted(group.ordinal for group in groups)
        if not groups or len(set(ordinals)) != len(ordinals):
            raise ValueError(f"an update needs groups with ordinals that differ, got {ordinals}")
        return sorted(groups, key=lambda group: group.ordinal)

    def _advantages(self, groups: Sequence[TrainingGroup]) -> Advantages:
        totals = []
        for group in groups:
            try:
                totals.append(total_rewards(group.rewards, self.config.trained_rewards))
            except ValueError as error:
                raise ValueError(f"group {group.ordinal}: {error}") from error
            if len(totals[-1]) != self.config.rollout.group_size:
                raise ValueError(
                    f"group {group.ordinal}: {len(totals[-1])} scores for "
                    f"{self.config.rollout.group_size} samples"
                )
        ranked = preferences(
            [group.rewards for group in groups], self.config.trained_rewards, self.config.advantage
        )
        return replace(group_advantages(ranked, self.config.advantage), totals=torch.stack(totals))

    def _live(self, rated: Sequence[RatedGroup]) -> list[LiveGroup]:
        device, dtype = self.policy.device, next(iter(self.trained.parameters.values())).dtype
        return [
            LiveGroup(
                ordinal=group.ordinal,
                latents=group.latents.to(device=device, dtype=dtype),
                advantages=advantages.to(device=device, dtype=dtype),
                condition={name: tensor.to(device) for name, tensor in group.condition.items()},
                sampled_at=group.sampled_at,
                trajectory=None if group.trajectory is None else group.trajectory.to(device, dtype),
                log_likelihoods=(
                    None if group.log_likelihoods is None else group.log_likelihoods.to(device, dtype)
                ),
            )
            for group, advantages in ((one.group, one.advantages) for one in rated)
        ]

    def _by_reference(self, groups: Sequence[LiveGroup], step: int) -> dict[int | None, list[LiveGroup]]:
        """Groups by the step of the past reference that they are compared with; None: that of now."""
        found: dict[int | None, list[LiveGroup]] = {}
        for group in groups:
            past = None if group.sampled_at is None else self.trained.past.before(step - group.sampled_at)
            found.setdefault(None if past is None else group.sampled_at, []).append(group)
        return found

    def _passes(self, live: Sequence[LiveGroup], share: Share) -> list[Passes]:
        """What this rank compares with what, in which order.

        Ranks whose weights are shards make every pass together: one with fewer groups makes idle ones.
        """
        if self.policy.shards is None:
            return [Passes(key, groups, None) for key, groups in self._by_reference(live, share.step).items()]
        assert self._ranks is not None
        own: dict[int | None, list[LiveGroup]] = {}

        # Inside the exchange: if it fails here, the other ranks hear of it and do not wait for this one.
        def wanted() -> dict[int | None, int]:
            own.update(self._by_reference(live, share.step))
            return {key: self.objective.passes(len(groups)) for key, groups in own.items()}

        most = most_passes(self._ranks, f"the shares of update {share.step}", wanted)
        stand_in = live[-1] if live else self._live([share.idle] if share.idle is not None else [])[0]
        return [
            Passes(
                key, own.get(key, []), Idle(stand_in, passes - self.objective.passes(len(own.get(key, []))))
            )
            for key, passes in most.items()
        ]

    def _report(
        self,
        groups: Sequence[TrainingGroup],
        advantages: Advantages,
        measured: Measurements,
        norms: Sequence[Tensor],
        rate: float,
        phases: Phases,
    ) -> UpdateMetrics:
        return UpdateMetrics(
            loss=measured.mean("loss"),
            dsm=measured.mean("dsm"),
            group_weight=measured.mean("weight"),
            group_score=measured.mean("score"),
            clip_fraction=measured.mean("clip_fraction"),
            kl=measured.mean("kl") if self.config.objective.kl > 0 else None,
            grad_norm=float(torch.stack(list(norms)).mean()) if norms else None,
            learning_rate=rate,
            micro_batch=self.objective.at_once,
            zero_variance_groups=int((~advantages.live).sum()),
            dropped_terms=dropped_terms([group.rewards for group in groups], self.config.trained_rewards),
            reward=spread(list(advantages.totals)),
            rewards=reward_spreads([group.rewards for group in groups]),
            seconds=dict(phases.seconds),
        )
