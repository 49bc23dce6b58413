"""TensorBoard event files from metrics rows, written without importing torch.

Promises
- One scalar a number, named section/name; null values are left out.
- After a resume TensorBoard shows one curve: a session start tells it to drop the steps that were undone.
"""

from __future__ import annotations

from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from services.metrics import AnyRow, EvalRow, UpdateRow

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


class TensorboardEvents:
    """Writes into one directory; each process run adds a file of its own."""

    def __init__(self, directory: Path, *, resumed_step: int | None = None) -> None:
        self._writer = EventFileWriter(str(directory))
        if resumed_step is not None:
            self._writer.add_event(
                Event(step=resumed_step + 1, session_log=SessionLog(status=SessionLog.START))
            )

    def add(self, row: AnyRow) -> None:
        if isinstance(row, UpdateRow | EvalRow):
            values = [
                Summary.Value(tag=tag, simple_value=value)
                for tag, value in scalars(row).items()
                if value is not None
            ]
            self._writer.add_event(Event(wall_time=row.time, step=row.step, summary=Summary(value=values)))

    def close(self) -> None:
        self._writer.close()


def scalars(row: UpdateRow | EvalRow) -> dict[str, float | None]:
    """The numbers of a row under their TensorBoard names."""
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
