"""The optimizer of an update: AdamW with float32 moments, or with moments of 8 bits (bitsandbytes).

Promises
- Moments are there from the start, so that a state is complete at any time.
- The state is everything: with it the next optimizer step is bit-identical. Of 8-bit moments it holds the
  codes, the scale of each block of 256, and the two tables that codes are decoded with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from services.config import LearnerConfig
from services.config_file import ConfigError

STEPS = "step"
"""Of the optimizer's state: how many steps each parameter has made, in the order of the parameters."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Of `adamw`, of the shape of the parameter each."""
TABLES = ("qmap1", "qmap2")
"""Of bitsandbytes, shared by all parameters: what a code of 8 bits stands for."""


def make_optimizer(parameters: Mapping[str, nn.Parameter], settings: LearnerConfig) -> Optimizer:
    """The optimizer of the trained parameters.

    Raises:
        ConfigError: `learner.optimizer` needs a package that is not installed.
    """
    options: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": settings.betas,
        "weight_decay": settings.weight_decay,
    }
    if settings.optimizer == "adamw":
        optimizer: Optimizer = torch.optim.AdamW(list(parameters.values()), fused=True, **options)
        for parameter in parameters.values():
            optimizer.state[parameter] = {
                STEPS: torch.zeros((), dtype=torch.float32, device=parameter.device),
                **{moment: torch.zeros_like(parameter) for moment in MOMENTS},
            }
        return optimizer
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            "learner.optimizer adamw8bit needs bitsandbytes 0.50 or newer: pip install 'dgpo-cluster[8bit]', "
            f"or set it to adamw ({error})"
        ) from error
    quantised: Any = AdamW8bit(list(parameters.values()), **options)
    for place, parameter in enumerate(parameters.values()):
        quantised.init_state(quantised.param_groups[0], parameter, 0, place)
    made: Optimizer = quantised
    return made


def optimizer_state(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Live tensors: `step`, how many each parameter has made; its moments as `KIND.PARAMETER`; tables."""
    moments = [optimizer.state[parameter] for parameter in parameters.values()]
    device = next(iter(parameters.values())).device
    steps = [torch.as_tensor(moment[STEPS], dtype=torch.float32, device=device) for moment in moments]
    found = {STEPS: torch.stack(steps)}
    for name, moment in zip(parameters, moments, strict=True):
        for kind, tensor in moment.items():
            if kind in TABLES:
                found[kind] = tensor
            elif kind != STEPS:
                found[f"{kind}.{name}"] = tensor
    return found


def load_moments(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], given: Mapping[str, Tensor]
) -> None:
    """Moments of `optimizer_state`, with the same names and shapes; `set_steps` has the rest."""
    for name, parameter in parameters.items():
        for kind, tensor in optimizer.state[parameter].items():
            if kind not in (*TABLES, STEPS):
                tensor.copy_(given[f"{kind}.{name}"])


def check_tables(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Raises ValueError where codes of 8 bits were made with another table than they would be read with."""
    for table in TABLES:
        if table in own and not torch.equal(own[table].cpu(), given[table].cpu()):
            raise ValueError(
                f"state of optimizer: its {table} is not that of the installed bitsandbytes, which would "
                "read other moments; install the version that wrote it"
            )


def set_steps(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], counts: Tensor) -> None:
    """Steps that each parameter has made, in the order of `parameters`."""
    for parameter, count in zip(parameters.values(), counts.tolist(), strict=True):
        moment = optimizer.state[parameter]
        if torch.is_tensor(moment[STEPS]):
            moment[STEPS].fill_(count)
        else:
            moment[STEPS] = int(count)


def learning_rate(config: LearnerConfig, step: int) -> float:
    """Of update `step`: linear warm-up, then constant or a cosine to `final_learning_rate` at `max_steps`."""
    peak = config.learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.final_learning_rate is None:
        return peak
    span = max(1, config.max_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    return config.final_learning_rate + (peak - config.final_learning_rate) * 0.5 * (
        1 + math.cos(math.pi * progress)
    )
