"""The `objective` section: one model a training objective, told apart by `objective.name`.

Each has the keys that it heeds and no others, so a key that would do nothing is refused.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from services.config.section import Section


class TimestepConfig(Section):
    first: int | None = Field(default=7, ge=1)
    """Train on the first (noisiest) this many solver steps: the paper's timestep clip, by count. null:
    by `t_min`."""
    t_min: float | None = Field(default=None, gt=0, lt=1)
    """Train on the solver steps at t >= this: the paper's timestep clip, by time (it has 0.3)."""
    t_min_of: Literal["unshifted", "shifted"] = "unshifted"
    """`t_min` is a time before the flow shift (the paper's), or a noise level sigma after it."""
    skip: int = Field(default=0, ge=0)
    """Leave out this many of the very noisiest steps: they decide layout and colours, which then stay as
    diverse as the base model's."""
    per_update: int = Field(default=4, ge=1)
    """Distinct timesteps drawn without replacement for an update, shared by all its groups."""
    draw: Literal["uniform", "stratified"] = "uniform"
    """Draw from all of them, or one from each of `per_update` equal parts of the range."""

    @model_validator(mode="after")
    def _enough(self) -> TimestepConfig:
        if (self.first is None) == (self.t_min is None):
            raise ValueError("give first or t_min: one of them is a number, the other null")
        if self.t_min is None and self.t_min_of != "unshifted":
            raise ValueError("t_min_of says what t_min is a time of, and there is no t_min: leave it out")
        if self.first is not None and self.per_update > self.first - self.skip:
            raise ValueError(
                f"per_update {self.per_update} exceeds the {max(0, self.first - self.skip)} steps "
                f"that first {self.first} and skip {self.skip} leave"
            )
        return self


class AnyObjective(Section):
    """What all objectives have."""

    method: ClassVar[str]
    """What it is called in print."""
    arxiv: ClassVar[str]
    """Number of the paper."""

    timesteps: TimestepConfig = TimestepConfig()
    kl: float = Field(default=0.0, ge=0)
    """Weight of the distance to the frozen base model: mean((v - v_base)^2) for dgpo and diffusion_nft, the
    KL of the steps' Gaussians for flow_grpo."""

    def samples_with_reference(self, step: int) -> bool:
        """Whether rollouts sample with the EMA reference after `step` updates."""
        return False

    @property
    def needs_base(self) -> bool:
        """Whether the learner must keep the frozen base model."""
        return self.kl > 0

    @property
    def guided_base(self) -> float:
        """Guidance under which the frozen base's velocity is taken."""
        return 1.0

    @property
    def needs_trajectory(self) -> bool:
        """Whether a group's payload must hold the whole trajectory of its samples."""
        return False


class WithReference(AnyObjective):
    """An objective with an EMA of the policy beside the policy."""

    reference_decay: float = Field(default=0.3, ge=0, lt=1)
    """Largest EMA decay of the reference; 0 makes it the policy at the start of the update."""
    reference_ramp: float = Field(default=0.001, gt=0)
    """Decay at update k is min(reference_decay, reference_ramp * k)."""
    reference_of: Literal["update", "rollout"] = "update"
    """For stale groups: the EMA reference as it is now, or as it was when the group was sampled, of which the
    learner keeps `queue.max_staleness` copies."""
    switch_step: int | None = Field(default=None, ge=0)
    """From this update on rollouts use the EMA reference's weights; null: always the current ones."""

    def samples_with_reference(self, step: int) -> bool:
        return self.switch_step is not None and step >= self.switch_step


class DgpoConfig(WithReference):
    """Direct Group Preference Optimization (arXiv 2510.08425)."""

    method = "Direct Group Preference Optimization"
    arxiv = "2510.08425"

    name: Literal["dgpo"] = "dgpo"
    """The objective."""
    beta: float = Field(default=100.0, gt=0)
    """Strength of the group preference: the group weight is sigmoid(beta * S_g)."""
    clip_range: float | None = Field(default=1e-2, gt=0)
    """PPO-style clip of exp(d_old - d); null switches it off."""
    cfg_free: bool | None = None
    """States what is trained: true, a model to be sampled without guidance (modes 2a, 2b); false, one to be
    sampled with it (mode 1). What contradicts it is refused; null states nothing."""
    kl_cfg: float = Field(default=1.0, ge=1.0)
    """Guidance under which the frozen base's velocity is taken (mode 2a); 1 is without guidance."""
    reference: Literal["frozen", "ema"] = "ema"
    """The model DGPO compares with: the frozen base, or an EMA of the policy."""
    shared_noise: bool = True
    """One training noise for all samples of a group and timestep (the paper's), or one a sample."""

    @property
    def needs_base(self) -> bool:
        return self.reference == "frozen" or self.kl > 0

    @property
    def guided_base(self) -> float:
        return self.kl_cfg

    @model_validator(mode="after")
    def _possible(self) -> DgpoConfig:
        if self.switch_step is not None and self.reference != "ema":
            raise ValueError("switch_step needs reference 'ema': there is no EMA to switch to")
        if self.reference_of != "update" and self.reference != "ema" and self.clip_range is None:
            raise ValueError(
                "reference_of has no effect with reference 'frozen' and no clip_range: leave it out"
            )
        if self.kl_cfg > 1 and self.reference != "frozen" and self.kl == 0:
            raise ValueError("kl_cfg has no effect without reference 'frozen' or kl > 0")
        return self


class FlowGrpoConfig(AnyObjective):
    """Flow-GRPO (arXiv 2505.05470): policy gradients on the steps of a stochastic sampler."""

    method = "Flow-GRPO"
    arxiv = "2505.05470"

    name: Literal["flow_grpo"]
    """The objective."""
    clip_range: float = Field(default=1e-4, gt=0)
    """PPO clip of the ratio of a step's likelihoods."""
    timesteps: TimestepConfig = TimestepConfig(first=9, per_update=9)

    @property
    def needs_trajectory(self) -> bool:
        return True


class DiffusionNftConfig(WithReference):
    """DiffusionNFT (arXiv 2509.16117): implicit positive and negative policies on the forward process."""

    method = "DiffusionNFT"
    arxiv = "2509.16117"

    name: Literal["diffusion_nft"]
    """The objective."""
    beta: float = Field(default=1.0, gt=0)
    """Mixes the policies: v+ = (1 - beta) v_old + beta v, v- = (1 + beta) v_old - beta v."""
    shared_noise: bool = False
    """One training noise for all samples of a group and timestep, or one a sample (the paper's)."""
    reference_decay: float = Field(default=0.5, ge=0, lt=1)
    """Largest EMA decay of the old policy; 0 makes it the policy at the start of the update."""
    switch_step: int | None = Field(default=0, ge=0)
    """From this update on rollouts use the old policy's weights (the paper's: always)."""


OBJECTIVES: dict[str, type[AnyObjective]] = {
    "dgpo": DgpoConfig,
    "flow_grpo": FlowGrpoConfig,
    "diffusion_nft": DiffusionNftConfig,
}


def _name(value: Any) -> str:
    # What is no section is taken for one of dgpo, which says so better than a missing tag would.
    name = value.get("name", "dgpo") if isinstance(value, dict) else getattr(value, "name", "dgpo")
    return str(name)


ObjectiveConfig = Annotated[
    Annotated[DgpoConfig, Tag("dgpo")]
    | Annotated[FlowGrpoConfig, Tag("flow_grpo")]
    | Annotated[DiffusionNftConfig, Tag("diffusion_nft")],
    Discriminator(_name),
]
