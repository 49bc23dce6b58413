"""What is refused before a run has a directory, and before anything of it is started.

Promises
- What costs least is looked at first; nothing heavy is imported before that is fine, but for a recording.
"""

from __future__ import annotations

import os

from services.config import Config
from services.config_file import ConfigError
from services.prompts import evaluates
from services.ray_access import refuse_without_access
from services.trackers import refuse_unusable_trackers


def refuse_unusable(config: Config) -> None:
    """What a run would fail at later, told without starting or loading anything: prompts and recordings that
    cannot be used, timesteps and sampler that the model does not bear, a large model here that is not whole,
    files of authorities that are none, a queue server that cannot be run, a Ray cluster that does not take
    this client, trackers without their packages.

    Raises:
        ConfigError: what does not fit, and what would.
    """
    evaluating = evaluates(config)
    server = config.queue.server
    if server is not None and not (server.is_file() and os.access(server, os.X_OK)):
        raise ConfigError(f"queue.server: {server} is no file that can be run")
    refuse_unusable_trackers(config)
    # They import torch.
    from learner.timesteps import configured_window
    from policy.registry import SLOW_TO_LOAD, check_files, check_sampling
    from services.context import queue_authority, reward_authority

    queue_authority(config)
    if not config.offline or evaluating:
        for reward in config.rewards:
            reward_authority(reward)
    try:
        configured_window(config)
        check_sampling(config)
        check_files(config.model, at_least=SLOW_TO_LOAD)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    refuse_without_access(config)
