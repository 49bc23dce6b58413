"""One update: from whole groups to a new policy version.

Promises
- A pure function of (weights, optimizer, EMAs, groups, step): noise and timesteps follow from the run seed,
  the step and the ordinals, never from the order of the groups, the process or the epoch. On one machine
  type and thread count the result is bit-identical.
- A group without a preference (all total rewards equal) adds no gradient, not even of the KL, and does not
  change the scale of the others.
- `state` holds everything that a continuation needs: after `load_state` the next update is bit-identical.
- Ranks that train an update together make the same optimizer steps on the same gradient, which is one rank's
  up to the order in which its terms are added.

Imports neither Ray nor Redis: the training loop calls it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from learner.activations import offloaded
from learner.advantages import Advantages, group_advantages, preferences, total_rewards
from learner.ema import Ema, PastReferences, evaluation_decay, reference_decay
from learner.micro_batch import agreed_micro_batch
from learner.objectives.base import LiveGroup, Measurements, Phases, TrainingGroup, make_objective
from learner.optimizer import (
    check_tables,
    learning_rate,
    load_moments,
    make_optimizer,
    optimizer_state,
    set_steps,
)
from learner.ranks import Order, Ranks
from learner.shares import RatedGroup, Share, hand_out, sum_gradients, sum_measurements
from learner.timesteps import configured_window, training_timesteps
from learner.update_metrics import UpdateMetrics, dropped_terms, reward_spreads, spread
from policy.base import Condition, Policy
from policy.schedule import make_schedule
from services.config import Config, WithReference
from services.safetensors_layout import pack

__all__ = ["State", "TrainingGroup", "UpdateError", "UpdateMetrics", "Updater", "learning_rate"]

State = dict[str, dict[str, Tensor]]
"""File name -> tensors: policy, ema, optimizer; where the objective needs them, reference and reference-k of
k updates ago."""


class UpdateError(RuntimeError):
    """The update cannot be made; nothing was changed by the optimizer step that failed."""


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
        self._parameters = policy.trainable()
        self._schedule = make_schedule(config.rollout)
        self._objective = make_objective(policy, config, self._schedule)
        self._window = configured_window(config)
        self.optimizer = make_optimizer(self._parameters, config.learner)
        chosen = config.learner.micro_batch
        self.micro_batch: int | None = None if chosen == "auto" else chosen
        """Samples in one forward-backward. With `auto` None until the first update, which finds it, or what a
        former learner of the run found, which is then kept to: another one would add up in another order."""
        self._settled = chosen != "auto"
        self._ema = Ema(self._parameters)
        wanted = self._objective.uses_reference
        self._reference = Ema(self._parameters) if wanted else None
        self._reference_is_policy = True
        self._past = PastReferences(self._parameters, config.past_references)

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
        if not self._settled:
            condition = self.policy.longest(ordered[0].condition)
            if self._ranks is not None:
                self._ranks.order_all(Order(do="fit", micro_batch=self.micro_batch), payload=pack(condition))
            self.settle(self.micro_batch, condition)
        rated = [
            RatedGroup(group, values)
            for group, values, live in zip(ordered, advantages.values, advantages.live.tolist(), strict=True)
            if live
        ]
        share = Share(step, len(ordered), len(rated), rated)
        if self._ranks is not None:
            with phases("ranks"):
                share = hand_out(self._ranks, share)
        measured, norms = self._train(share, phases)
        if self._ranks is not None:
            self._ranks.settled()
        return self._report(
            ordered, advantages, measured, norms, learning_rate(self.config.learner, step), phases
        )

    def settle(self, known: int | None, condition: Condition) -> None:
        """Fix the micro-batch of `auto`, on every rank: the one that is known, or the largest that fits.

        Args:
            condition: of a prompt as long as any.

        Raises:
            UpdateError: on every rank: one of them has no memory for one sample.
        """
        self.micro_batch = known or agreed_micro_batch(
            self._ranks,
            self._objective,
            condition=condition,
            timestep=self._window[0],
            reference=None if self._reference is None else self._reference.tensors,
            activations=self._activations,
        )
        if self.micro_batch is None:
            raise UpdateError(
                "learner.micro_batch auto: there is no memory for a single sample; set "
                "learner.gradient_checkpointing to true, model.dtype to bfloat16, or see docs/memory.md"
            )
        self._objective.micro_batch = self.micro_batch
        self._settled = True

    def follow(self, share: Share) -> None:
        """Train on what rank 0 has handed to this rank."""
        self._train(share, Phases())

    def _train(self, share: Share, phases: Phases) -> tuple[Measurements, list[Tensor]]:
        """Every optimizer step of an update; returns what all ranks have measured, and the gradient norms."""
        learner, step = self.config.learner, share.step
        self._objective.phases = phases
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
        for part in parts if share.live else ():
            self.optimizer.zero_grad(set_to_none=True)
            accumulate = partial(self._accumulate, live, part, share, measured)
            if self._ranks is None:
                accumulate()
            else:
                waited_s = self._ranks.waited_s
                parameters = list(self._parameters.values())
                sum_gradients(self._ranks, f"the gradient of update {step}", parameters, accumulate)
                phases.seconds["ranks"] += self._ranks.waited_s - waited_s
            with phases("optimizer"):
                norms.append(self._optimize(learning_rate(learner, step), step))
            self._reference_is_policy = False
        self.optimizer.zero_grad(set_to_none=True)
        with phases("ema"):
            self._fold(step)
        if self._ranks is not None:
            with phases("ranks"):
                measured = sum_measurements(self._ranks, f"the end of update {step}", measured)
        return measured, norms

    def _accumulate(
        self, live: Sequence[LiveGroup], part: Sequence[int], share: Share, measured: Measurements
    ) -> None:
        """Add the gradient of one optimizer step to `.grad`."""
        for sampled, reference in self._by_reference(live, share.step):
            with self._activations():
                gained = self._objective.accumulate(
                    sampled, part, step=share.step, scale=1 / (share.groups * len(part)), reference=reference
                )
            measured.add(gained.pairs, **gained.sums)

    def ema_tensors(self) -> dict[str, Tensor]:
        """The EMA that is evaluated and exported. Live tensors: read them before the next update."""
        return dict(self._ema.tensors)

    def rollout_tensors(self, step: int) -> dict[str, Tensor]:
        """What rollout workers sample with after `step` updates: the policy, or the EMA reference.

        Live tensors: read them before the next update.
        """
        if self._reference is not None and self.config.objective.samples_with_reference(step):
            return dict(self._reference.tensors)
        return {name: parameter.detach() for name, parameter in self._parameters.items()}

    def state(self) -> State:
        """Everything a continuation needs. Live tensors: write them before the next update."""
        state = {
            "policy": {name: parameter.detach() for name, parameter in self._parameters.items()},
            "ema": dict(self._ema.tensors),
            "optimizer": optimizer_state(self.optimizer, self._parameters),
        }
        if self._reference is not None:
            state["reference"] = dict(self._reference.tensors)
        for ago, past in enumerate(self._past.kept, start=1):
            state[f"reference-{ago}"] = dict(past.tensors)
        return state

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Continue from what `state` returned, in this or another process.

        Raises:
            ValueError: a part or a tensor is missing, unknown or of another shape; nothing was changed.
        """
        own = self.state()
        # Read once: the parts of a checkpoint are files.
        state = {part: state[part] for part in state}
        _check_same(own, state)
        check_tables(own["optimizer"], state["optimizer"])
        with torch.no_grad():
            for part in own.keys() - {"optimizer"}:
                torch._foreach_copy_(list(own[part].values()), [state[part][name] for name in own[part]])
            load_moments(self.optimizer, self._parameters, state["optimizer"])
        self._continue_behind(state["optimizer"]["step"])

    def take_from_rank_0(self) -> None:
        """Continue, on every rank, from the state of rank 0."""
        assert self._ranks is not None
        state = self.state()
        tensors = [tensor for part in state.values() for tensor in part.values()]
        self._ranks.broadcast("the weights and the optimizer of rank 0", tensors)
        self._continue_behind(state["optimizer"]["step"])

    def _continue_behind(self, counts: Tensor) -> None:
        """What follows from a state that is in place, but for the optimizer's `counts` of steps."""
        set_steps(self.optimizer, self._parameters, counts)
        if self._reference is not None:
            self._reference_is_policy = all(
                torch.equal(self._reference.tensors[name], parameter)
                for name, parameter in self._parameters.items()
            )

    def _activations(self) -> AbstractContextManager[None]:
        if not self.config.learner.activation_offload:
            return nullcontext()
        model = self.policy.transformer
        return offloaded([*model.parameters(), *model.buffers()])

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
        device, dtype = self.policy.device, next(iter(self._parameters.values())).dtype
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

    def _by_reference(
        self, groups: Sequence[LiveGroup], step: int
    ) -> list[tuple[list[LiveGroup], Mapping[str, Tensor] | None]]:
        """Groups and the reference they are compared with; None: it equals the policy as it is now."""
        now = None if self._reference_is_policy or self._reference is None else self._reference.tensors
        found: dict[int | None, tuple[list[LiveGroup], Mapping[str, Tensor] | None]] = {}
        for group in groups:
            past = None if group.sampled_at is None else self._past.before(step - group.sampled_at)
            key, reference = (None, now) if past is None else (group.sampled_at, past)
            found.setdefault(key, ([], reference))[0].append(group)
        return list(found.values())

    def _optimize(self, rate: float, step: int) -> Tensor:
        norm = torch.nn.utils.clip_grad_norm_(
            self._parameters.values(), self.config.learner.max_grad_norm, foreach=True
        )
        if not bool(torch.isfinite(norm)):
            raise UpdateError(
                f"update {step}: the gradient is not finite (norm {float(norm)}); "
                "lower learner.learning_rate or objective.beta, or resume from the last checkpoint"
            )
        for options in self.optimizer.param_groups:
            options["lr"] = rate
        self.optimizer.step()
        return norm

    def _fold(self, step: int) -> None:
        decay = evaluation_decay(self.config.learner, step)
        if decay is not None:
            self._ema.fold(self._parameters, decay)
        if self._reference is not None:
            assert isinstance(self.config.objective, WithReference)
            self._past.keep(self._reference.tensors)
            decay = reference_decay(self.config.objective, step + 1)
            self._reference.fold(self._parameters, decay)
            self._reference_is_policy = decay == 0.0

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
            micro_batch=self._objective.micro_batch,
            zero_variance_groups=int((~advantages.live).sum()),
            dropped_terms=dropped_terms([group.rewards for group in groups], self.config.trained_rewards),
            reward=spread(list(advantages.totals)),
            rewards=reward_spreads([group.rewards for group in groups]),
            seconds=dict(phases.seconds),
        )


def _check_same(own: State, given: Mapping[str, Mapping[str, Tensor]]) -> None:
    if own.keys() != given.keys():
        raise ValueError(f"state has parts {sorted(given)}, expected {sorted(own)}")
    for part, tensors in own.items():
        differ = [
            name
            for name in sorted(tensors.keys() | given[part].keys())
            if name not in tensors
            or name not in given[part]
            or tensors[name].shape != given[part][name].shape
        ]
        if differ:
            raise ValueError(
                f"state of {part}: {len(differ)} tensors are missing, unknown or of another shape, "
                f"first {differ[0]!r}; was it written with another model, model.train or "
                "learner.optimizer?"
            )
