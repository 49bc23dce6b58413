"""What an evaluation reads of a configuration; what only a training run reads goes with it, whatever it is.

An evaluation neither trains nor has a queue, a guard or an evaluator, and nobody watches its workers. What
only they read must not stand in the way of how an evaluation samples: `rollout.steps` below
`objective.timesteps.first`, more workers than parts that take turns may have.
"""

from __future__ import annotations

from typing import Any, Final

from services.config import Sections

NEVER_S: Final = 1e9
"""Longer than the deadline of any reward, also of one that `--rewards` names."""


def evaluation_sections(sections: Sections) -> dict[str, Any]:
    """The sections of a Config for an evaluation, in JSON's types.

    No learner or evaluator reserves anything in it, or needs what it would have.
    """
    told = sections.model_dump(
        mode="json", exclude={"advantage", "objective", "learner", "checkpoint", "guard", "telemetry"}
    )
    told["objective"] = {"timesteps": {"first": None, "t_min": 0.5}}
    told["learner"] = {"groups_per_step": 1, "micro_batch": 1, "num_cpus": 0.0, "num_gpus": 0.0}
    told["queue"] |= {"max_staleness": 0, "max_groups": 1}
    told["eval"] |= {"num_cpus": 0.0, "num_gpus": 0.0}
    told["cluster"]["colocate"] = False
    told["rollout"]["hang_s"] = NEVER_S
    return told
