"""Training from a recording (`prompts.source: recorded`): which group an ordinal gets, and what must agree.

Promises
- An ordinal's group is a pure function of (recording, run seed, ordinal): the first pass goes through the
  recording in the order of its ordinals, each later one in an order of its own.
- A configuration that contradicts the recording is refused before anything is started, with every reason.
- Held-out prompts are never recorded ones: those of `eval.path`, or of words that no run trains on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property, lru_cache

from services.config import Config
from services.config_file import find
from services.messages import Prompt
from services.prompt_lists import HeldoutList, read_list
from services.prompts import WordPrompts, seeded
from services.recording import Facts, Recording, RecordingError


def place_of(seed: int, ordinal: int, size: int) -> int:
    """Where in a recording of `size` groups the group of an ordinal is.

    >>> [place_of(0, ordinal, 3) for ordinal in range(3)]
    [0, 1, 2]
    >>> sorted(place_of(0, ordinal, 3) for ordinal in range(3, 6))
    [0, 1, 2]
    """
    turn, place = divmod(ordinal, size)
    return place if turn == 0 else _pass_order(seed, turn, size)[place]


@lru_cache(maxsize=2)
def _pass_order(seed: int, turn: int, size: int) -> tuple[int, ...]:
    order = list(range(size))
    seeded(seed, "pass", turn).shuffle(order)
    return tuple(order)


def open_recording(config: Config) -> Recording:
    """The recording that `prompts.path` names, if the configuration can be trained from it.

    Raises:
        RecordingError: it is missing, empty or damaged, or contradicts the configuration: all the reasons.
    """
    assert config.prompts.path is not None  # PromptsConfig refuses a recorded source without a path
    recording = Recording.open(find(config.prompts.path))
    found = list(_contradictions(config, recording))
    if found:
        raise RecordingError(
            f"prompts.path {recording.directory}: cannot be trained from with this configuration:\n"
            + "\n".join(f"  {reason}" for reason in found)
        )
    return recording


class RecordedPrompts:
    """The prompts of a recording (services/prompts.py `PromptSource`)."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.recording = open_recording(config)

    def training(self, seed: int, ordinal: int) -> Prompt:
        return self.recording.header(place_of(seed, ordinal, len(self.recording))).prompt

    def heldout(self, seed: int, count: int) -> list[Prompt]:
        return self._heldout.heldout(seed, count) if self._heldout is not None else []

    @cached_property
    def _heldout(self) -> HeldoutList | WordPrompts | None:
        path = self._config.eval.path
        if path is not None:
            heldout = HeldoutList(read_list(find(path)), f"eval.path {path}")
            texts = {self.recording.header(place).prompt.text for place in range(len(self.recording))}
            heldout.refuse(texts, str(self.recording.directory))
            return heldout
        return WordPrompts() if self.recording.facts.prompts == "words" else None


def differences(config: Config, facts: Facts) -> list[str]:
    """What is not as it was when the groups were recorded, and yet no contradiction: worth knowing.

    Another model may be the same one at another place, or a descendant with the same latents and conditions.
    """
    rollout = config.rollout
    pairs = [("model.path", facts.model, config.model.path)]
    pairs += [
        (f"rollout.{key}", getattr(facts, key), getattr(rollout, key))
        for key in ("solver", "steps", "shift", "guidance", *_newer_keys(facts))
    ]
    return [f"{key}: recorded with {was!r}, now {now!r}" for key, was, now in pairs if was != now]


def _contradictions(config: Config, recording: Recording) -> Iterator[str]:
    facts, rollout, size = recording.facts, config.rollout, len(recording)
    if facts.group_size != rollout.group_size:
        yield f"rollout.group_size is {rollout.group_size}, its groups have {facts.group_size} samples"
    if (facts.height, facts.width) != (config.model.height, config.model.width):
        yield (
            f"model.height and width are {config.model.height} x {config.model.width}, its images "
            f"{facts.height} x {facts.width}: latents of shape {facts.latent_shape}"
        )
    if facts.sigmas is not None and facts.sigmas != rollout.sigmas:
        yield (
            f"rollout.sigmas is {rollout.sigmas!r}, its groups were sampled with {facts.sigmas!r}: those of "
            "another family of models, or at noise levels that are not trained then"
        )
    channels = _latent_channels(config)
    if channels is not None and len(facts.latent_shape) == 3 and channels != facts.latent_shape[0]:
        yield (
            f"model.path {config.model.path} has latents of {channels} channels, the recorded ones have "
            f"shape {facts.latent_shape}"
        )
    if size < config.learner.groups_per_step:
        yield (
            f"learner.groups_per_step is {config.learner.groups_per_step}, it has {size} groups: an update "
            "would train one twice"
        )
    yield from _missing_rewards(config, recording)
    if config.objective.needs_trajectory:
        yield from _untrainable_trajectories(config, facts)


def _newer_keys(facts: Facts) -> tuple[str, ...]:
    """What only newer recordings say; that sigmas differ is a contradiction of its own."""
    return ("terminal",) if facts.sigmas is not None else ()


def _missing_rewards(config: Config, recording: Recording) -> Iterator[str]:
    headers = [recording.header(place) for place in range(len(recording))]
    for reward in config.trained_rewards:
        without = [header.ordinal for header in headers if reward.name not in header.rewards]
        # An optional one may be absent from some groups, but trains nothing if it is absent from all.
        if without and (reward.required or len(without) == len(headers)):
            yield (
                f"reward {reward.name!r} is missing from {len(without)} of {len(headers)} groups, first "
                f"ordinal {without[0]}; recorded: {', '.join(recording.facts.rewards)}"
            )
    names = {reward.name for reward in config.trained_rewards}
    bare = [header.ordinal for header in headers if names.isdisjoint(header.rewards)]
    if bare and not any(reward.required for reward in config.trained_rewards) and len(bare) < len(headers):
        yield f"{len(bare)} groups, first ordinal {bare[0]}, have no score of any trained reward"


def _untrainable_trajectories(config: Config, facts: Facts) -> Iterator[str]:
    name, rollout = config.objective.name, config.rollout
    if not facts.trajectory:
        yield (
            f"objective {name!r} needs the trajectories and likelihoods of solver 'sde'; these groups "
            f"({facts.solver!r}) have only their final latents: record with an objective that needs them"
        )
        return
    for key in ("solver", "noise_level", "steps", "shift", "guidance", *_newer_keys(facts)):
        was, now = getattr(facts, key), getattr(rollout, key)
        if was != now:
            yield f"rollout.{key} is {now!r}, the recorded likelihoods are those of {was!r}"


def _latent_channels(config: Config) -> int | None:
    """Of the model's VAE; None where that cannot be told without loading it."""
    try:
        found = json.loads((find(config.model.path) / "vae" / "config.json").read_text())
        return int(found["latent_channels"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
