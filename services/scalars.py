"""The numbers of a metrics row under the names that curves have: section/name.

Promises
- The same names in TensorBoard and in every tracker.
"""

from __future__ import annotations

from services.metrics import EvalRow, UpdateRow

_TRAIN = (
    "reward_mean",
    "reward_std",
    "loss",
    "dsm",
    "grad_norm",
    "group_weight",
    "group_score",
    "clip_fraction",
    "kl",
    "learning_rate",
    "zero_variance_groups",
)
_FLOW = (
    "seconds",
    "groups_per_s",
    "staleness_mean",
    "staleness_max",
    "queue_depth",
    "queue_bytes",
    "rss_bytes",
)


def scalars(row: UpdateRow | EvalRow) -> dict[str, float | None]:
    """The numbers of a row by name; null where there is none."""
    if isinstance(row, EvalRow):
        return {
            **{f"eval/{name}": value.mean for name, value in row.rewards.items()},
            **{f"eval/{name}_exact": value.mean for name, value in row.exact.items()},
            **{f"eval/diversity_{name}": value for name, value in row.diversity.items()},
        }
    return {
        **{f"train/{name}": getattr(row, name) for name in _TRAIN},
        **{f"flow/{name}": getattr(row, name) for name in _FLOW},
        **{f"reward/{name}": value.mean for name, value in row.rewards.items()},
        **{
            f"reward/{name}_{part}": getattr(value, part)
            for name, value in row.rewards.items()
            for part in ("std", "p10", "p50", "p90")
        },
        **{f"time/{name}": value for name, value in row.phases.items()},
        "rollout/probe_error": row.probe_error,
        **{f"time/update_{name}": value for name, value in row.update.items()},
        **{f"time/rollout_{name}": value for name, value in row.rollout.items()},
    }
