"""What `dgpo doctor` says of a local model: are its files whole, and can it be sampled as configured."""

from __future__ import annotations

from services.config import Config
from services.doctor.finding import Finding


def file_findings(config: Config) -> list[Finding]:
    """Whether every file of weights is whole, and holds what its component needs; only headers are read."""
    from policy.errors import PolicyError
    from policy.registry import check_files

    try:
        checked = check_files(config.model)
    except PolicyError as error:
        return [Finding(what="model files", ok=False, found=str(error), remedy="mend model.path, as it says")]
    size = sum(file.stat().st_size for file in checked.files)
    unclear = "; ".join(f"but for the {name}: {why}" for name, why in checked.unclear.items())
    found = (
        f"{len(checked.files)} safetensors files, {size / 1024**2:,.1f} MiB: their headers are whole, with "
        "the names and shapes that each config.json describes"
    )
    return [Finding(what="model files", ok=True, found="; ".join(filter(None, (found, unclear))))]


def rollout_findings(config: Config) -> list[Finding]:
    """Whether the model can be sampled so."""
    from policy.errors import PolicyError
    from policy.registry import check_sampling

    rollout, evaluation = config.rollout, config.evaluation_rollout
    try:
        check_sampling(config)
    except PolicyError as error:
        return [
            Finding(what="rollout", ok=False, found=str(error), remedy="set rollout, or model, as it says")
        ]
    found = (
        f"{rollout.solver} with {rollout.steps} steps, shift {rollout.shift:g}, guidance {rollout.guidance:g}"
    )
    beside = "" if evaluation.solver == rollout.solver else f"; evaluations with {evaluation.solver}"
    return [Finding(what="rollout", ok=True, found=f"the model can be sampled so: {found}{beside}")]


def shift_findings(config: Config) -> list[Finding]:
    """A shift that is not that of the image size, of a hub's published models too."""
    from services.stock_shift import other_shift

    told = other_shift(config)
    if told is None:
        return []
    found, remedy = told
    return [Finding(what="shift", ok=True, warning=True, found=found, remedy=remedy)]
