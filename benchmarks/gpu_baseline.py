"""The loop that `benchmarks/gpu.py` compares with: stock diffusers and peft, written straight down.

The same architecture, objective and settings as the project's own step, by the plainest means: the stock
pipeline samples and decodes each group; for every group and timestep three forward passes of the whole group
(policy, reference, base), the reference's adapters loaded from host memory and the policy's put back, one
backward pass, AdamW as it comes; at the end of the step the adapters go through the host to the rollouts.
Conditions are given, as they are to the project's own step: encoding is timed apart. Adapters are float32 and
everything else bfloat16, under autocast, as diffusers' own training scripts have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from learner.objectives.base import slices
from policy.base import Condition
from policy.families.sd3 import StableDiffusion3Policy
from policy.schedule import make_schedule, make_scheduler
from services.config import Config, DgpoConfig


class PlainLoop:
    """One step after another.

    Args:
        pipeline: a stock SD3 pipeline on its device, without adapters.
        config: of the run; what is not said above it heeds.
        condition, negative: the condition of every group, and the one guided away from.
        micro_batch: samples in one pass; the group size unless that does not fit.
    """

    def __init__(
        self, pipeline: Any, config: Config, condition: Condition, negative: Condition, micro_batch: int
    ) -> None:
        from peft import LoraConfig

        self.pipeline, self.config, self.micro_batch = pipeline, config, micro_batch
        self.condition, self.negative = condition, negative
        self.transformer: Any = pipeline.transformer
        self.transformer.requires_grad_(False)
        lora, make_config = config.model.lora, LoraConfig
        self.transformer.add_adapter(
            make_config(
                r=lora.rank,
                lora_alpha=lora.alpha,
                target_modules=list(StableDiffusion3Policy.lora_targets),
                init_lora_weights="gaussian",
            )
        )
        self.adapters: dict[str, nn.Parameter] = {}
        for name, parameter in self.transformer.named_parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
                self.adapters[name] = parameter
        learner = config.learner
        self.optimizer = torch.optim.AdamW(
            self.adapters.values(),
            lr=learner.learning_rate,
            betas=learner.betas,
            weight_decay=learner.weight_decay,
        )
        self.reference = self._to_host()
        self.schedule = make_schedule(config.rollout)
        self.device = next(self.transformer.parameters()).device
        self.dtype = pipeline.vae.dtype

    def sample(self, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Latents (G, C, h, w) and images (G, 3, H, W) of one group."""
        rollout, size = self.config.rollout, len(seeds)
        self.pipeline.scheduler = make_scheduler(rollout)
        with torch.no_grad(), self._autocast():
            latents = self.pipeline(
                prompt_embeds=self._spread(self.condition["prompt_embeds"], size),
                pooled_prompt_embeds=self._spread(self.condition["pooled"], size),
                negative_prompt_embeds=self._spread(self.negative["prompt_embeds"], size),
                negative_pooled_prompt_embeds=self._spread(self.negative["pooled"], size),
                num_inference_steps=rollout.steps,
                guidance_scale=rollout.guidance,
                height=self.config.model.height,
                width=self.config.model.width,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="latent",
            ).images
        with torch.no_grad():
            vae = self.pipeline.vae
            images = vae.decode(latents.to(self.dtype) / vae.config.scaling_factor + vae.config.shift_factor)
            return latents.float(), images.sample.float().cpu()

    def update(self, groups: Sequence[Tensor], advantages: Sequence[Tensor]) -> float:
        """One optimizer step; returns the mean loss."""
        objective, total = self.config.objective, 0.0
        assert isinstance(objective, DgpoConfig)
        pairs = [(index, place) for index in self._timesteps() for place in range(len(groups))]
        for index, place in pairs:
            x0 = groups[place]
            noise = torch.randn_like(x0[:1]).expand_as(x0)
            sigma = self.schedule.sigmas[index].to(x0)
            x, target = (1 - sigma) * x0 + sigma * noise, noise - x0
            with torch.no_grad():
                policy = self._to_host()
                self._from_host(self.reference)
                known = (self._forward(x, index) - target).square().mean(dim=(1, 2, 3))
                self._from_host(policy)
                self.transformer.disable_adapters()
                base = self._forward(x, index)
                self.transformer.enable_adapters()
                if self.micro_batch < len(x0):
                    now = (self._forward(x, index) - target).square().mean(dim=(1, 2, 3))
                    weight = self._weight(now, known, advantages[place], objective.beta)
            for part in slices(len(x0), self.micro_batch):
                velocity = self._passed(x[part], index)
                error = (velocity - target[part]).square().mean(dim=(1, 2, 3))
                if self.micro_batch >= len(x0):
                    weight = self._weight(error.detach(), known, advantages[place], objective.beta)
                ratio, better = torch.exp(known[part] - error.detach()), advantages[place][part] > 0
                clip = objective.clip_range or torch.inf
                cut = torch.where(better, ratio > 1 + clip, ratio < 1 - clip)
                kl = (velocity - base[part]).square().mean(dim=(1, 2, 3))
                loss = weight * (advantages[place][part] * ~cut * error).sum() + objective.kl * kl.sum()
                loss = loss / (len(x0) * len(pairs))
                loss.backward()  # type: ignore[no-untyped-call]
                total += loss.item()
        nn.utils.clip_grad_norm_(self.adapters.values(), self.config.learner.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        # The new reference, and what rollouts sample with from here on.
        self.reference = self._to_host()
        self._from_host(self.reference)
        return total

    def _timesteps(self) -> list[int]:
        picked = self.config.objective.timesteps
        return torch.randperm(picked.first or len(self.schedule))[: picked.per_update].tolist()

    @staticmethod
    def _weight(now: Tensor, known: Tensor, advantages: Tensor, beta: float) -> Tensor:
        return torch.sigmoid(beta * (advantages * (now - known)).mean())

    def _forward(self, x: Tensor, index: int) -> Tensor:
        return torch.cat([self._passed(part, index) for part in x.split(self.micro_batch)])  # type: ignore[no-untyped-call]

    def _passed(self, x: Tensor, index: int) -> Tensor:
        with self._autocast():
            velocity: Tensor = self.transformer(
                hidden_states=x.to(self.dtype),
                timestep=self.schedule.timesteps[index].to(self.device).expand(len(x)),
                encoder_hidden_states=self._spread(self.condition["prompt_embeds"], len(x)),
                pooled_projections=self._spread(self.condition["pooled"], len(x)),
                return_dict=False,
            )[0]
        return velocity.float()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    @staticmethod
    def _spread(tensor: Tensor, samples: int) -> Tensor:
        return tensor.expand(samples, *tensor.shape)

    def _to_host(self) -> dict[str, Tensor]:
        return {name: parameter.detach().cpu().clone() for name, parameter in self.adapters.items()}

    @torch.no_grad()
    def _from_host(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self.adapters.items():
            parameter.copy_(tensors[name])
