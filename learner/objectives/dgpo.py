"""Direct Group Preference Optimization (arXiv 2510.08425): the gradient of learner/objectives/formulas.py.

Promises
- `Dgpo.accumulate` adds the exact gradient of the loss for any micro-batch: a multiple of the group size
  (several groups in one forward) or a divisor of it (a group in several).
- A velocity that is known to equal another is not computed twice, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from learner.objectives.base import LiveGroup, Measurements, Objective, OptimizerStep, slices
from learner.objectives.formulas import (
    clipped,
    dsm_error,
    group_losses,
    group_scores,
    group_weights,
    kl_penalty,
)
from learner.objectives.forward_process import NoisedBatch, noised
from policy.base import Policy
from policy.schedule import Schedule
from services.config import Config, DgpoConfig


@dataclass(frozen=True)
class Compared:
    """What the models DGPO compares with say of a batch, no gradient; None: the policy's own value."""

    old_dsm: Tensor | None
    """(N,) DSM error under the EMA reference, which the clip is relative to."""
    reference_dsm: Tensor | None
    """(N,) DSM error under the reference."""
    base_velocity: Tensor | None
    """(N, C, h, w) of the frozen base, when the KL needs it."""


class Dgpo(Objective):
    """The objective.

    What it costs a sample and timestep, in forward passes (a backward counts two): 3, and one for each model
    it is compared with. With a KL, or weights in shards, and a micro-batch below the group size it is one
    more, unless activations are offloaded.
    """

    def __init__(self, policy: Policy, config: Config, schedule: Schedule) -> None:
        super().__init__(policy, config, schedule)
        assert isinstance(config.objective, DgpoConfig)
        self._objective = config.objective
        self._parameters = list(policy.trainable().values())
        self._needs_base = config.objective.needs_base

    @property
    def uses_reference(self) -> bool:
        return self._objective.reference == "ema" or self._objective.clip_range is not None

    def _add(
        self, groups: Sequence[LiveGroup], index: int, shared: OptimizerStep, measured: Measurements
    ) -> None:
        seed, one_noise = self.config.run.seed, self._objective.shared_noise
        batch = noised(groups, self.schedule, index, seed=seed, step=shared.step, shared=one_noise)
        advantages = torch.stack([group.advantages for group in groups])
        # The weight can come last only where it scales all of a gradient that is still here.
        deferrable = self._objective.kl == 0 and not self.sharded
        # A group in pieces has all its graphs at once only where the device need not hold them.
        if self.at_once >= self.config.rollout.group_size or (
            self.config.learner.activation_offload and not deferrable
        ):
            way = self._whole
        elif deferrable:
            way = self._deferred
        else:
            way = self._scored_first
        way(batch, advantages, shared.scale, shared.reference, measured)

    def _whole(
        self,
        batch: NoisedBatch,
        advantages: Tensor,
        scale: float,
        reference: Mapping[str, Tensor] | None,
        measured: Measurements,
    ) -> None:
        """Whole groups, forwards first: the weight is known before the backward."""
        groups, group_size = advantages.shape
        flat = advantages.flatten()
        compared = self._compare(batch, reference)
        velocity, dsm = self._forward(batch)
        now = dsm.detach()
        cut = self._clipped(now, compared, flat)
        scores = self._scores(now, compared, advantages)
        weights = group_weights(scores, self._objective.beta)
        slope = weights.repeat_interleave(group_size) * flat * ~cut * (scale / group_size)
        loss = (slope * dsm).sum()
        kl = self._kl(velocity, compared)
        if kl is not None:
            loss = loss + (self._objective.kl * scale / group_size) * kl.sum()
        self.backward(loss)
        self._measure(measured, now, scores, cut, None if kl is None else kl.detach(), groups)

    def _deferred(
        self,
        batch: NoisedBatch,
        advantages: Tensor,
        scale: float,
        reference: Mapping[str, Tensor] | None,
        measured: Measurements,
    ) -> None:
        """One group in pieces: its gradient without the weight first, in a buffer of its own."""
        group_size = advantages.shape[1]
        held = self._take_gradients()
        errors, cuts, references = [], [], []
        for samples in slices(group_size, self.at_once):
            piece, part = batch.part(samples), advantages[0, samples]
            compared = self._compare(piece, reference)
            _, dsm = self._forward(piece)
            now = dsm.detach()
            cut = self._clipped(now, compared, part)
            self.backward((part * ~cut * (scale / group_size) * dsm).sum())
            errors.append(now)
            cuts.append(cut)
            references.append(now if compared.reference_dsm is None else compared.reference_dsm)
        now = torch.cat(errors)
        scores = group_scores(now[None], torch.cat(references)[None], advantages)
        self._add_gradients(held, group_weights(scores, self._objective.beta)[0])
        self._measure(measured, now, scores, torch.cat(cuts), None, 1)

    def _scored_first(
        self,
        batch: NoisedBatch,
        advantages: Tensor,
        scale: float,
        reference: Mapping[str, Tensor] | None,
        measured: Measurements,
    ) -> None:
        """One group in pieces whose gradient the group weight cannot scale afterwards.

        With a KL term two buffers would take two backward passes (5 forwards' worth in all); a forward pass
        for the scores alone makes it 4.
        """
        group_size = advantages.shape[1]
        pieces = slices(group_size, self.at_once)
        compared = [self._compare(batch.part(samples), reference) for samples in pieces]
        if compared[0].reference_dsm is None:
            scores = advantages.new_zeros(1)
        else:
            with self._without_graph(), self.phases("score"):
                dsm = torch.cat([self._errors(batch.part(samples)) for samples in pieces])
                known = torch.cat([one.reference_dsm for one in compared if one.reference_dsm is not None])
                scores = group_scores(dsm[None], known[None], advantages)
            scores = scores.clone()
        weight = group_weights(scores, self._objective.beta)[0]
        errors, cuts, kls = [], [], []
        for samples, one in zip(pieces, compared, strict=True):
            part = advantages[0, samples]
            velocity, dsm_part = self._forward(batch.part(samples))
            now = dsm_part.detach()
            cut = self._clipped(now, one, part)
            kl = self._kl(velocity, one)
            loss = (weight * part * ~cut * dsm_part).sum()
            if kl is not None:
                loss = loss + self._objective.kl * kl.sum()
                kls.append(kl.detach())
            self.backward((scale / group_size) * loss)
            errors.append(now)
            cuts.append(cut)
        kl = torch.cat(kls) if kls else None
        self._measure(measured, torch.cat(errors), scores, torch.cat(cuts), kl, 1)

    def _compare(self, batch: NoisedBatch, reference: Mapping[str, Tensor] | None) -> Compared:
        old = None
        base_dsm = None
        base_velocity = None
        with self._without_graph(), self.phases("reference"):
            if self.uses_reference and reference is not None:
                with self.policy.swapped(reference):
                    old = self._errors(batch)
            if self._needs_base:
                with self.policy.base():
                    base_velocity = self._velocity(batch, guidance=self._objective.kl_cfg)
                base_dsm = dsm_error(base_velocity, batch.target)
        # Inference tensors may not be saved for a backward; copies made out here may.
        return Compared(
            old_dsm=None if old is None else old.clone(),
            reference_dsm=_clone(base_dsm if self._objective.reference == "frozen" else old),
            base_velocity=_clone(base_velocity) if self._objective.kl > 0 else None,
        )

    def _without_graph(self) -> AbstractContextManager[Any]:
        # What shards are gathered into would be of no use to a backward if it was made in inference mode.
        return torch.no_grad() if self.sharded else torch.inference_mode()

    def _errors(self, batch: NoisedBatch) -> Tensor:
        return dsm_error(self._velocity(batch), batch.target)

    def _forward(self, batch: NoisedBatch) -> tuple[Tensor, Tensor]:
        with self.phases("forward"):
            velocity = self._velocity(batch)
            return velocity, dsm_error(velocity, batch.target)

    def _velocity(self, batch: NoisedBatch, guidance: float = 1.0) -> Tensor:
        """Of any batch, no more than a micro-batch at once."""
        size, micro_batch = len(batch.x0), self.at_once
        pieces = [batch] if size <= micro_batch else [batch.part(p) for p in slices(size, micro_batch)]
        negative = self.policy.negative() if guidance > 1 else None
        found = [
            self.policy.velocity(
                piece.x, piece.timestep, piece.conditions, guidance=guidance, negative=negative
            )
            for piece in pieces
        ]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _clipped(self, dsm: Tensor, compared: Compared, advantages: Tensor) -> Tensor:
        old = dsm if compared.old_dsm is None else compared.old_dsm
        return clipped(dsm, old, advantages, self._objective.clip_range)

    def _scores(self, dsm: Tensor, compared: Compared, advantages: Tensor) -> Tensor:
        known = dsm if compared.reference_dsm is None else compared.reference_dsm
        return group_scores(dsm.view_as(advantages), known.view_as(advantages), advantages)

    def _kl(self, velocity: Tensor, compared: Compared) -> Tensor | None:
        return None if compared.base_velocity is None else kl_penalty(velocity, compared.base_velocity)

    def _take_gradients(self) -> list[Tensor | None]:
        held = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        return held

    def _add_gradients(self, held: list[Tensor | None], weight: Tensor) -> None:
        """`.grad` becomes held + weight * `.grad`."""
        fresh = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        torch._foreach_mul_(fresh, weight)
        pairs = [(p, h) for p, h in zip(self._parameters, held, strict=True) if h is not None]
        both = [(p, p.grad, h) for p, h in pairs if p.grad is not None]
        if both:
            torch._foreach_add_([h for _, _, h in both], [g for _, g, _ in both])
        for parameter, gradient in pairs:
            parameter.grad = gradient

    def _measure(
        self,
        measured: Measurements,
        dsm: Tensor,
        scores: Tensor,
        cut: Tensor,
        kl: Tensor | None,
        groups: int,
    ) -> None:
        group_size = len(dsm) // groups
        loss = group_losses(scores, self._objective.beta).sum()
        sums = {"dsm": dsm.sum() / group_size, "clip_fraction": cut.sum() / group_size}
        if kl is not None:
            sums["kl"] = kl.sum() / group_size
            loss = loss + self._objective.kl * sums["kl"]
        weights = group_weights(scores, self._objective.beta).sum()
        measured.add(groups, loss=loss, weight=weights, score=scores.sum(), **sums)


def _clone(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


OBJECTIVES = {"dgpo": Dgpo}
