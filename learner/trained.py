"""What an update changes: the trained parameters, the optimizer's moments, the EMAs and the references.

Promises
- `state` holds everything that a continuation needs: after `load` the next update is bit-identical.
- Where the policy's weights are shards, all of it is: this rank's rows of every tensor, of the same names.
  Only what is small or of no rank in particular is whole: the optimizer's count of steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from learner.ema import Ema, PastReferences, evaluation_decay, reference_decay
from learner.optimizer import STEPS, check_tables, load_moments, make_optimizer, optimizer_state, set_steps
from learner.ranks import Ranks
from policy.base import Policy
from services.config import Config, WithReference

State = dict[str, dict[str, Tensor]]
"""Part -> tensors: policy, ema, optimizer; where the objective needs them, reference and reference-k of
k updates ago."""


class UpdateError(RuntimeError):
    """The update cannot be made; nothing was changed by the optimizer step that failed."""


class Trained:
    """What is trained of one policy.

    Args:
        policy: with its trained parameters.
        config: of the run.
        ranks: those that share the weights, where they are shards; or the updates.
        uses_reference: whether the objective compares with an EMA reference.
    """

    def __init__(self, policy: Policy, config: Config, ranks: Ranks | None, *, uses_reference: bool) -> None:
        self.config = config
        self.policy = policy
        self.parameters = policy.trainable()
        self._ranks = ranks
        self.optimizer = make_optimizer(self.parameters, config.learner)
        self.ema = Ema(self.parameters)
        self.reference = Ema(self.parameters) if uses_reference else None
        self.reference_is_policy = True
        self.past = PastReferences(self.parameters, config.past_references)

    def optimize(self, rate: float, step: int) -> Tensor:
        """One optimizer step on what is in `.grad`; returns the norm of the whole gradient before clipping.

        Raises:
            UpdateError: it is not finite.
        """
        norm = self._clip(step)
        if not bool(torch.isfinite(norm)):
            raise UpdateError(
                f"update {step}: the gradient is not finite (norm {float(norm)}); "
                "lower learner.learning_rate or objective.beta, or resume from the last checkpoint"
            )
        for options in self.optimizer.param_groups:
            options["lr"] = rate
        self.optimizer.step()
        self.reference_is_policy = False
        return norm

    def _clip(self, step: int) -> Tensor:
        parameters, limit = self.parameters.values(), self.config.learner.max_grad_norm
        if self.policy.shards is None:
            return torch.nn.utils.clip_grad_norm_(parameters, limit, foreach=True)
        assert self._ranks is not None
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        own = torch.nn.utils.get_total_norm(gradients, foreach=True).to(self.policy.device, torch.float64)
        square = own.square().reshape(1)
        self._ranks.sum(f"the gradient's norm of update {step}", [square])
        norm = square.sqrt().reshape(()).to(next(iter(parameters)).dtype)
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm, foreach=True)
        return norm

    def fold(self, step: int) -> None:
        """The update is over: averages follow."""
        decay = evaluation_decay(self.config.learner, step)
        if decay is not None:
            self.ema.fold(self.parameters, decay)
        if self.reference is not None:
            assert isinstance(self.config.objective, WithReference)
            self.past.keep(self.reference.tensors)
            decay = reference_decay(self.config.objective, step + 1)
            self.reference.fold(self.parameters, decay)
            self.reference_is_policy = decay == 0.0

    def reference_now(self) -> Mapping[str, Tensor] | None:
        """None: it equals the policy as it is now, or there is none."""
        return None if self.reference_is_policy or self.reference is None else self.reference.tensors

    def state(self) -> State:
        """Everything a continuation needs. Live tensors: write them before the next update."""
        state = {
            "policy": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "ema": dict(self.ema.tensors),
            "optimizer": optimizer_state(self.optimizer, self.parameters),
        }
        if self.reference is not None:
            state["reference"] = dict(self.reference.tensors)
        for ago, past in enumerate(self.past.kept, start=1):
            state[f"reference-{ago}"] = dict(past.tensors)
        return state

    def held(self) -> Iterator[Tensor]:
        """Every tensor that is kept beside the policy's own."""
        for moments in self.optimizer.state.values():
            yield from (value for value in moments.values() if isinstance(value, Tensor))
        for average in (self.ema, self.reference, *self.past.kept):
            yield from (average.tensors.values() if average is not None else ())

    def load(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
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
            load_moments(self.optimizer, self.parameters, state["optimizer"])
        self._continue_behind(state["optimizer"][STEPS])

    def take_from_rank_0(self) -> None:
        """Continue, on every rank, from the state of rank 0; shards, which no two ranks share, stay."""
        assert self._ranks is not None
        if self.policy.shards is None:
            state = self.state()
            tensors = [tensor for part in state.values() for tensor in part.values()]
            self._ranks.broadcast("the weights and the optimizer of rank 0", tensors)
            self._continue_behind(state["optimizer"][STEPS])
            return
        # Rows that equal the reference's say nothing of those of other ranks.
        said = self._ranks.exchange("the comparison of reference and policy", self._reference_flag)
        self.reference_is_policy = all(one == b"\x01" for one in said)

    def replicated(self) -> dict[str, Tensor]:
        """What is the same on all ranks: the trained weights, or what is whole beside shards."""
        if self.policy.shards is None:
            return dict(self.parameters)
        buffers = dict(self.policy.transformer.named_buffers())
        return buffers | {f"optimizer.{STEPS}": self.state()["optimizer"][STEPS]}

    def _reference_flag(self) -> bytes:
        return bytes([self.reference_is_policy])

    def _continue_behind(self, counts: Tensor) -> None:
        """What follows from a state that is in place, but for the optimizer's `counts` of steps."""
        set_steps(self.optimizer, self.parameters, counts)
        if self.reference is not None:
            self.reference_is_policy = all(
                torch.equal(self.reference.tensors[name], parameter)
                for name, parameter in self.parameters.items()
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
