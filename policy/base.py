"""What every model family offers: encode, initial latents, velocity, decode, and trainable tensors.

Promises
- Everything equals what the stock diffusers pipeline of the same directory computes (bit for bit in float32,
  where its weights lie in memory as ours do: policy/loading.py `align`).
- Trained parameters are float32, whatever the dtype of the frozen weights.
- `install` binds every tensor or none; `swapped` and `base` restore exactly what was there, also when the
  body raises.
- Parameters keep their identity for the life of the policy, so an optimizer may hold them.

policy/pipeline_policy.py implements most of it for the families of diffusers pipelines (policy/families/).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from policy.adapters import adapters_switched
from policy.errors import InstallError, PolicyError
from services.config import ModelConfig, RolloutConfig

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from policy.sharding import Shards

Condition = dict[str, Tensor]
"""The encoded prompt of one sample, no batch dimension; for SD3 `prompt_embeds` (L, D) and `pooled` (P,).
What each family has is in docs/models.md."""

CONDITION_CACHE_BYTES = 128 * 1024**2


class Policy(ABC):
    """A diffusion transformer to sample from and to train, with the frozen parts around it.

    Args:
        config: the `model` section.
        pipeline: the stock diffusers pipeline, frozen, on the device.
        transformer: its denoiser (of SDXL a U-Net), with adapters already in it when LoRA is trained.
        base: keep a frozen copy for `base()` when every weight is trained.
    """

    def __init__(self, config: ModelConfig, pipeline: Any, transformer: nn.Module, *, base: bool) -> None:
        self.config = config
        self.pipeline = pipeline
        self.transformer = transformer
        self.device = next(transformer.parameters()).device
        self._trainable = {
            name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad
        }
        self.shards: Shards | None = None
        """Where the trained parameters are shards: all tensors by name below are then this rank's rows."""
        self._bound: Mapping[str, Tensor] | None = None
        """What `swapped` runs with; None: the policy's own tensors."""
        self._adapters_off = False
        self._base: dict[str, Tensor] | None = None
        if config.train == "full" and base:
            self._base = self.tensors()
        self._conditions: OrderedDict[str | None, Condition] = OrderedDict()
        self._condition_bytes = 0

    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one sample's latents."""

    @abstractmethod
    def velocity(
        self,
        x: Tensor,
        timestep: Tensor,
        condition: Condition | Sequence[Condition],
        *,
        guidance: float = 1.0,
        negative: Condition | None = None,
    ) -> Tensor:
        """The model output v = noise - x0.

        Args:
            x: (N, C, h, w) noisy latents, float32.
            timestep: () or (N,), in the unit of the solver's timesteps (sigma * 1000).
            condition: one, shared by all N samples; or B of them, each shared by N / B consecutive samples.
            guidance: classifier-free guidance scale; above 1 it needs `negative` and costs two forwards.
            negative: the condition guided away from, see `negative()`.

        Returns:
            (N, C, h, w) velocities, float32.
        """

    @abstractmethod
    def _encode(self, prompt: str) -> Condition:
        """The condition of one prompt, computed alone so that it does not depend on a batch."""

    @abstractmethod
    def initial_latents(self, seeds: Sequence[int]) -> Tensor:
        """(G, C, h, w) noise, as the stock pipeline draws it from one CPU generator a sample."""

    @abstractmethod
    def decode(self, latents: Tensor, batch: int) -> NDArray[np.uint8]:
        """(N, H, W, 3) uint8 images of (N, C, h, w) latents, `batch` decoded at once."""

    @abstractmethod
    def random_condition(self, generator: torch.Generator) -> Condition:
        """A condition of no prompt, made of Gaussian numbers, for the velocity probe (policy/probe.py)."""

    @classmethod  # noqa: B027 - a model may bear any
    def check_rollout(cls, rollout: RolloutConfig) -> None:
        """Whether groups may be sampled so.

        Raises:
            PolicyError: the model cannot be sampled so; the text says how it can.
        """

    def encode(self, prompt: str) -> Condition:
        """The condition of a prompt; the last ones are kept, up to 128 MiB."""
        return self._kept(prompt, lambda: self._encode(prompt))

    def prepare(  # noqa: B027 - only what is kept on disk can be prepared
        self,
        prompts: Iterable[str],
        *,
        negative: bool = False,
        done: Callable[[str], None] = lambda prompt: None,
    ) -> None:
        """Encode what `encode` will be asked for, all in one loading of the text encoders where they are not
        loaded for good (`model.text_encoders: cached`); else nothing needs to be done.

        Args:
            negative: what `negative` will be asked for too.
            done: called with each prompt as soon as it is encoded.
        """

    def prepared(self, prompt: str) -> bool:
        """Whether `encode` has no work to do that `prepare` could do for several prompts at once."""
        return True

    def longest(self, condition: Condition) -> Condition:
        """A condition as long as that of any prompt, made of this one."""
        return condition

    def negative(self) -> Condition:
        """The condition that guidance leads away from: of the empty prompt, or what the family has for it."""
        return self.encode("")

    def _kept(self, key: str | None, compute: Callable[[], Condition]) -> Condition:
        """A condition, computed if it is not kept; None is the key of one that is of no prompt."""
        if key in self._conditions:
            self._conditions.move_to_end(key)
            return dict(self._conditions[key])
        condition = compute()
        self._conditions[key] = condition
        self._condition_bytes += _bytes(condition)
        while self._condition_bytes > CONDITION_CACHE_BYTES and len(self._conditions) > 1:
            _, dropped = self._conditions.popitem(last=False)
            self._condition_bytes -= _bytes(dropped)
        return dict(condition)

    def shard(self, mesh: DeviceMesh, *, base: bool = True) -> None:
        """Keep this rank's rows of every trained tensor, on the mesh's device; once, and on every rank.

        From here on the trained parameters are others, and every forward and backward is one of all ranks.

        Args:
            mesh: of one dimension, the ranks.
            base: keep a frozen copy of the rows for `base()`.

        Raises:
            ValueError: adapters are trained, which are too small to be sharded.
        """
        if self.config.train != "full":
            raise ValueError(f"model.train is {self.config.train!r}: only full weights are sharded")
        # Here and not above: rollout workers have no use for what it imports.
        from policy.sharding import Shards

        lowered = self.config.dtype != "float32"
        compute = getattr(torch, self.config.dtype) if lowered else None
        self._base = None
        self.shards = Shards(self.transformer, mesh, compute=compute)
        self._trainable = self.shards.parameters
        self.device = next(iter(self._trainable.values())).device
        if base:
            self._base = self.tensors()

    def held(self) -> Iterator[Tensor]:
        """Every tensor that this policy keeps, wherever it is."""
        parts = (part for part in vars(self.pipeline).values() if isinstance(part, nn.Module))
        for module in (self.transformer, *parts):
            yield from module.parameters()
            yield from module.buffers()
        yield from (self._base or {}).values()
        for condition in self._conditions.values():
            yield from condition.values()

    def trainable(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name, float32; the same objects at every call."""
        return dict(self._trainable)

    def tensors(self) -> dict[str, Tensor]:
        """A detached copy of the trained parameters, on their device."""
        return {name: parameter.detach().clone() for name, parameter in self._trainable.items()}

    def install(self, tensors: Mapping[str, Tensor]) -> int:
        """Copy tensors into the trained parameters, in place.

        Returns:
            How many were bound: all of them.

        Raises:
            InstallError: a name or a shape differs; nothing was changed.
        """
        self._check(tensors)
        with torch.no_grad():
            torch._foreach_copy_(list(self._trainable.values()), [tensors[name] for name in self._trainable])
        return len(self._trainable)

    @contextmanager
    def swapped(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Run with other trained tensors: parameters point at them for the length of the block.

        No element is copied when the tensors are float32 on the policy's device. Writing to parameters
        inside the block writes to `tensors`. Shards change places with `tensors` instead.
        """
        self._check(tensors)
        before, self._bound = self._bound, tensors
        try:
            with self._pointed(tensors) if self.shards is None else self.shards.exchanged(tensors):
                yield
        finally:
            self._bound = before

    @contextmanager
    def _pointed(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        own = {name: parameter.data for name, parameter in self._trainable.items()}
        try:
            for name, parameter in self._trainable.items():
                parameter.data = tensors[name].to(device=self.device, dtype=parameter.dtype)
            yield
        finally:
            for name, parameter in self._trainable.items():
                parameter.data = own[name]

    @contextmanager
    def base(self) -> Iterator[None]:
        """Run as the frozen base model: adapters off, or the weights that were loaded."""
        if self.config.train == "lora":
            with self._adapters(off=True):
                yield
            return
        if self._base is None:
            raise InstallError(
                "the frozen base is not kept: load the policy with base=True (model.train is 'full')"
            )
        with self.swapped(self._base):
            yield

    def checkpoint_gradients(self) -> None:
        """From here on a backward pass computes again what each block of the model did, and keeps less.

        A block is computed again with its adapters on or off as they were; gradients are the same bit for
        bit. Passes without a gradient are as before.

        Raises:
            PolicyError: the model has no such blocks.
        """
        if not getattr(self.transformer, "_supports_gradient_checkpointing", False):
            raise PolicyError(
                f"learner.gradient_checkpointing: a {type(self.transformer).__name__} cannot; set it to false"
            )
        transformer: Any = self.transformer

        def checkpointed(block: nn.Module, *inputs: Any) -> Any:
            bound, adapters_off = self._bound, self._adapters_off

            def run(*given: Any) -> Any:
                with self._as_it_was(bound, adapters_off):
                    return block(*given)

            # No randomness to repeat: a denoiser is in eval mode.
            return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)

        transformer.enable_gradient_checkpointing(checkpointed)

    @contextmanager
    def _as_it_was(self, bound: Mapping[str, Tensor] | None, adapters_off: bool) -> Iterator[None]:
        """Run a block in the backward pass as it was run in the forward pass."""
        if self._bound is not bound:
            raise RuntimeError(
                "a backward pass found other trained tensors than its forward pass had: run it inside the "
                "same `swapped` or `base`"
            )
        with nullcontext() if self._adapters_off == adapters_off else self._adapters(off=adapters_off):
            yield

    @contextmanager
    def _adapters(self, *, off: bool) -> Iterator[None]:
        before, self._adapters_off = self._adapters_off, off
        try:
            with adapters_switched(self.transformer, off=off):
                yield
        finally:
            self._adapters_off = before

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        missing = sorted(self._trainable.keys() - tensors.keys())
        unknown = sorted(tensors.keys() - self._trainable.keys())
        shapes = [
            f"{name} is {tuple(tensors[name].shape)}, expected {tuple(parameter.shape)}"
            for name, parameter in self._trainable.items()
            if name in tensors and tensors[name].shape != parameter.shape
        ]
        kinds = [
            f"{name} is {tensor.dtype}, expected a floating point dtype"
            for name, tensor in tensors.items()
            if not tensor.is_floating_point()
        ]
        problems = [
            *([f"missing {_some(missing)}"] if missing else []),
            *([f"unknown {_some(unknown)}"] if unknown else []),
            *([f"wrong shape: {_some(shapes)}"] if shapes else []),
            *([f"wrong dtype: {_some(kinds)}"] if kinds else []),
        ]
        if problems:
            raise InstallError(
                f"tensors do not fit the {len(self._trainable)} trained parameters of "
                f"{self.config.path} (train: {self.config.train}): {'; '.join(problems)}"
            )


def _bytes(condition: Condition) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in condition.values())


def _some(items: Sequence[str], limit: int = 4) -> str:
    rest = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + rest
