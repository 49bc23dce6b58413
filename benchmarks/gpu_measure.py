"""What `benchmarks/gpu.py` measures, one method a figure; what is in each figure is said there.

Promises
- Every time ends with the device idle: nothing is timed that is only launched.
- What was computed is looked at: a latent, an image or a loss that is not finite is an error.
- Where memory does not suffice the micro-batch is lowered, and the one that was used is told.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
import torch
from torch import Tensor

from benchmarks.gpu_baseline import PlainLoop
from benchmarks.random_models import (
    encode_random,
    random_condition,
    random_pipeline,
    random_policy,
    random_text_encoders,
)
from learner.update import TrainingGroup, Updater
from policy.base import Policy
from policy.loading import find_device
from rollout_workers.sampling import sample
from services.config import Config, RolloutConfig
from services.config_file import load_config
from services.planning.published import GIB, Published, needed_passes, pass_cost

RECIPE = "sd35-medium-geneval"
HALF_S = 240.0
"""After so many seconds nothing is repeated."""
KEPT_BUFFER_BYTES = 256 * 1024**2
"""As services/policy_store.py: a publish buffer up to this size is used again."""

WARM = 2
"""Updates before the first that is timed."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Sizes:
    """What is measured, and how often."""

    model: str
    overrides: tuple[str, ...] = ()
    group: int = 24
    """Samples of the group whose rollout and update are timed."""
    step_group: int = 16
    step_groups: int = 4
    """A whole step is so many groups."""
    rounds: int = 3
    matrix: int = 8192
    """Side of the matrices that find the peak."""

    @property
    def images(self) -> int:
        return self.step_group * self.step_groups


class Bench:
    """All measurements.

    Args:
        say: takes a line for people.
        overrides: of the recipe.
    """

    def __init__(self, say: Say, sizes: Sizes, overrides: tuple[str, ...]) -> None:
        self.say, self.sizes, self.overrides = say, sizes, overrides
        self.started = time.perf_counter()
        self.model = Published.named(sizes.model)
        self.config = self.configured(sizes.group, 1)
        self.device = find_device(self.config.model.device)
        self.dtype: torch.dtype = getattr(torch, self.config.model.dtype)
        self.peak = matmul_rate(self.device, self.dtype, sizes.matrix)
        section = self.config.model
        self.cost = pass_cost(self.model, section.height, section.width, section.lora)

    def machine(self) -> dict[str, Any]:
        name = torch.cuda.get_device_name(self.device) if self.on_gpu else "cpu"
        versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
        return {"device": name, **versions, "peak_tflops": self.peak / 1e12}

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def configured(self, group_size: int, groups: int, micro_batch: int | None = None) -> Config:
        measured = [f"rollout.group_size={group_size}", f"learner.groups_per_step={groups}"]
        measured.append(f"learner.micro_batch={micro_batch or group_size}")
        # What is measured comes last: it is what the tables say.
        return load_config(RECIPE, [*self.sizes.overrides, *self.overrides, *measured])

    def policy(self, train: str) -> Policy:
        self.say(f"making {self.model.name}: {self.cost.parameters / 1e9:.2g} B random weights, {train}")
        model = self.config.model.model_copy(update={"train": train})
        return random_policy(self.model, model, base=False)

    def condition(self, seed: int) -> dict[str, Tensor]:
        return random_condition(self.model, self.device, self.dtype, seed)

    def free(self) -> None:
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, job: Callable[[], object]) -> float:
        self.wait()
        start = time.perf_counter()
        job()
        self.wait()
        return time.perf_counter() - start

    def median(self, job: Callable[[], object]) -> float:
        found = [self.seconds(job)]
        while len(found) < self.sizes.rounds and time.perf_counter() - self.started < HALF_S:
            found.append(self.seconds(job))
        return statistics.median(found)

    def watch_memory(self) -> None:
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gib(self) -> float | None:
        """The most that tensors held since `watch_memory`, weights and all; None on the CPU."""
        return torch.cuda.max_memory_allocated(self.device) / GIB if self.on_gpu else None

    def fitting(self, group_size: int, job: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
        """What a job returns with the largest micro-batch that fits, and that micro-batch."""
        for micro_batch in divisors(group_size):
            try:
                return job(micro_batch) | {"micro_batch": micro_batch}
            except torch.OutOfMemoryError:
                self.say(f"a micro-batch of {micro_batch} does not fit")
            self.free()
        raise RuntimeError("not even a micro-batch of 1 fits on this GPU")

    def rollout(self, policy: Policy) -> dict[str, Any]:
        """One group after another, to final latents."""
        rollout, condition, negative = self.config.rollout, self.condition(1), self.condition(2)
        seeds = range(rollout.group_size)
        found: list[Tensor] = []
        sample(policy, condition, negative, seeds, short(rollout))
        self.watch_memory()
        seconds = self.median(lambda: found.append(sample(policy, condition, negative, seeds, rollout)))
        require_finite("latents", found[-1])
        passes = rollout.steps * (2 if rollout.guidance > 1 else 1)
        return self._rate("images", len(seeds), seconds, passes * self.cost.forward)

    def learner(self, policy: Policy, micro_batch: int) -> dict[str, Any]:
        """Updates of one group; the first two are not timed: only behind one is there a reference that is not
        the policy."""
        config = self.configured(self.sizes.group, 1, micro_batch)
        updater = Updater(policy, config)
        losses: list[float | None] = []

        def update() -> None:
            group = self.group(config, len(losses), self.noise(policy, config))
            losses.append(updater.step([group], len(losses)).loss)

        for _ in range(WARM):
            update()
        self.watch_memory()
        seconds = self.median(update)
        require_finite("losses", torch.tensor([math.nan if loss is None else loss for loss in losses]))
        needed = needed_passes(config)
        flops = needed["train"] * self.cost.train + needed["forward"] * self.cost.forward
        return self._rate("samples", config.rollout.group_size, seconds, flops) | {"loss": losses[-1]}

    def _rate(self, what: str, count: int, seconds: float, flops: int) -> dict[str, Any]:
        return {
            f"{what}_per_s": count / seconds,
            "tflop_each": flops / 1e12,
            "share": count * flops / seconds / self.peak,
            "peak_gib": self.peak_gib(),
        }

    def step(self, policy: Policy, micro_batch: int) -> dict[str, Any]:
        """Rollout, decoding and update; on one GPU one after the other."""
        sizes = self.sizes
        config = self.configured(sizes.step_group, sizes.step_groups, micro_batch)
        updater, rollout = Updater(policy, config), config.rollout
        condition, negative = self.condition(1), self.condition(2)
        groups: list[TrainingGroup] = []

        def sampled(first: int) -> None:
            groups.clear()
            for ordinal in range(first, first + sizes.step_groups):
                seeds = range(ordinal * sizes.step_group, (ordinal + 1) * sizes.step_group)
                latents = sample(policy, condition, negative, seeds, rollout)
                groups.append(self.group(config, ordinal, latents))

        def decoded() -> None:
            for group in groups:
                if policy.decode(group.latents, rollout.decode_batch).std() == 0:
                    raise RuntimeError("images are of one colour: what the VAE decoded is not finite")

        def updated(step: int) -> None:
            loss = updater.step(groups, step).loss
            require_finite("loss of a step", torch.tensor(math.nan if loss is None else loss))

        warm = self.group(config, 0, self.noise(policy, config))
        # Every kind of pass once: the first update has no reference yet that is not the policy.
        for number in range(WARM):
            updater.step([warm], number)
        sample(policy, condition, negative, range(sizes.step_group), short(rollout))
        policy.decode(warm.latents, rollout.decode_batch)
        self.watch_memory()
        times: list[tuple[float, float, float]] = []
        for number in range(WARM, WARM + min(2, sizes.rounds)):
            sample_s = self.seconds(partial(sampled, number * sizes.step_groups))
            decode_s = self.seconds(decoded)
            times.append((sample_s, decode_s, self.seconds(partial(updated, number))))
        require_finite("latents of a step", torch.cat([group.latents for group in groups]))
        sample_s, decode_s, update_s = (statistics.median(column) for column in zip(*times, strict=True))
        return {
            "images": sizes.images,
            "step_s": sample_s + decode_s + update_s,
            "rollout_s": sample_s + decode_s,
            "decode_s": decode_s,
            "update_s": update_s,
            "peak_gib": self.peak_gib(),
        }

    def baseline(self, micro_batch: int) -> dict[str, Any]:
        """The same step in plain diffusers and peft; a group before it is not timed."""
        sizes = self.sizes
        config = self.configured(sizes.step_group, sizes.step_groups, micro_batch)
        self.say("making the same model for the baseline")
        pipeline = random_pipeline(self.model, self.device, self.dtype)
        loop = PlainLoop(pipeline, config, self.condition(1), self.condition(2), micro_batch)
        advantages = torch.linspace(-1, 1, sizes.step_group, device=self.device)
        channels, grid = (
            self.model.config["in_channels"],
            self.model.grid(config.model.height, config.model.width),
        )
        loop.update([torch.randn((sizes.step_group, channels, *grid), device=self.device)], [advantages])
        loop.sample(range(sizes.step_group))
        self.watch_memory()
        groups: list[Tensor] = []
        losses: list[float] = []

        def sampled() -> None:
            for ordinal in range(sizes.step_groups):
                seeds = range(ordinal * sizes.step_group, (ordinal + 1) * sizes.step_group)
                groups.append(loop.sample(seeds)[0])

        rollout_s = self.seconds(sampled)
        update_s = self.seconds(lambda: losses.append(loop.update(groups, [advantages] * len(groups))))
        require_finite("latents of the baseline", torch.cat(groups))
        require_finite("loss of the baseline", torch.tensor(losses))
        seconds = {"step_s": rollout_s + update_s, "rollout_s": rollout_s, "update_s": update_s}
        return {"images": sizes.images, **seconds, "peak_gib": self.peak_gib()}

    def text(self) -> dict[str, float]:
        """Seconds of text encoders a group: `once_s` as workers ask them, for a prompt that all samples have;
        `each_s` as the plain loop does, for each sample and each negative prompt again."""
        self.say("making the text encoders")
        model, samples = self.model, self.sizes.step_group
        encoders = random_text_encoders(model, self.device, self.dtype)
        calls = 2 if self.config.rollout.guidance > 1 else 1
        for prompts in (1, samples):
            for states in encode_random(model, encoders, prompts):
                require_finite("conditions", states)
        once_s = self.median(lambda: encode_random(model, encoders, 1))
        each_s = self.median(lambda: [encode_random(model, encoders, samples) for _ in range(calls)])
        return {"once_s": once_s, "each_s": each_s}

    def noise(self, policy: Policy, config: Config) -> Tensor:
        return torch.randn((config.rollout.group_size, *policy.latent_shape()))

    def group(self, config: Config, ordinal: int, latents: Tensor) -> TrainingGroup:
        """A group whose samples are all differently good."""
        scores = torch.linspace(0, 1, len(latents)).tolist()
        rewards = {reward.name: scores for reward in config.trained_rewards}
        return TrainingGroup(ordinal=ordinal, latents=latents, rewards=rewards, condition=self.condition(1))

    def weights(self, policy: Policy) -> dict[str, Any]:
        """From trained parameters, through proven bytes, back into them."""
        try:
            from services.codec import WeightsEncoder, decode_weights, weights_digest
        except ImportError as error:
            return {"not_measured": str(error)}
        source, buffer, published_s = policy.trainable(), None, []

        def published() -> None:
            nonlocal buffer
            start, encoder = time.perf_counter(), WeightsEncoder(source, buffer)
            for name, tensor in source.items():
                encoder.write(name, [tensor])
            payload, digest = encoder.finish()
            buffer = payload if payload.size <= KEPT_BUFFER_BYTES else None
            published_s.append(time.perf_counter() - start)
            arrived = decode_weights(payload)
            if weights_digest(arrived) != digest or policy.install(arrived) != len(source):
                raise RuntimeError("the weights that arrived are not those that were published")

        published()
        total_s = self.median(published)
        size = sum(tensor.nbytes for tensor in source.values())
        return {"mb": size / 1e6, "published_s": statistics.median(published_s[1:]), "installed_s": total_s}


def matmul_rate(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """FLOP/s of the best of three times ten products of square matrices."""
    left, right = (torch.randn((side, side), device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(4):  # the first warms up
        begin = time.perf_counter()
        for _ in range(10):
            product = left @ right
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - begin)
    return 10 * 2 * side**3 / best


def short(rollout: RolloutConfig) -> RolloutConfig:
    """Enough steps for every kind of step of a solver: to warm up."""
    return rollout.model_copy(update={"steps": 3})


def divisors(number: int) -> list[int]:
    """Largest first.

    >>> divisors(12)
    [12, 6, 4, 3, 2, 1]
    """
    return [divisor for divisor in range(number, 0, -1) if number % divisor == 0]


def require_finite(what: str, tensor: Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise RuntimeError(f"{what}: not finite, so nothing that was timed means anything")
