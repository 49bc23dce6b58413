"""Every shipped recipe trains: two updates of its own sampler, reward server, codec and objective.

Those for models that are not shipped: tests/unit/policy/test_published_recipes.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from learner.trainer import training_group
from learner.update import Updater
from policy import load_policy
from reward_servers.app import create_app
from reward_servers.launch import server_config
from reward_servers.local import LocalServer
from rollout_workers.policy_sampler import PolicySampler
from rollout_workers.scoring import RewardServers
from services.codec import decode_group, encode_group, weights_digest
from services.config import RewardConfig
from services.config_file import PROJECT_ROOT, find, load_config
from services.context import RewardPlace, SecretPlace
from services.messages import GroupHeader, PolicyVersion
from services.prompts import group_task, prompt_source
from services.transports.shared_directory import SharedDirectoryTransport

RECIPES = [
    path
    for path in sorted((PROJECT_ROOT / "recipes").glob("*.yaml"))
    if find(load_config(path).model.path).is_dir()
]
SMALLER = ("rollout.group_size=4", "learner.groups_per_step=2", "learner.micro_batch=4")


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[RewardConfig], RewardPlace]]:
    """Where a reward is served; each scorer is started once for its arguments."""
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text("t" * 32)
    token.chmod(0o600)
    places: dict[str, RewardPlace] = {}
    with ExitStack() as stack:

        def place(reward: RewardConfig) -> RewardPlace:
            key = f"{reward.app} {reward.args}"
            if key not in places:
                app = create_app(server_config(reward, token))
                url = stack.enter_context(LocalServer(app)).url
                places[key] = RewardPlace(url=url, token=SecretPlace(file=token))
            return places[key]

        yield place


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_it_trains_for_two_updates(
    recipe: Path, serve: Callable[[RewardConfig], RewardPlace], tmp_path: Path
) -> None:
    config = load_config(recipe, SMALLER)
    if config.prompts.source == "recorded":
        pytest.skip("needs a recording; tests/integration/test_offline_training.py makes one")
    torch.set_num_threads(1)
    sampler = PolicySampler(config, tmp_path, SharedDirectoryTransport(tmp_path))
    policy = load_policy(
        config.model, text_encoders=config.learner_guides, vae=False, base=config.objective.needs_base, seed=0
    )
    updater, prompts, digests = Updater(policy, config), prompt_source(config), []
    trained = config.trained_rewards
    scorer = RewardServers(trained, {reward.name: serve(reward) for reward in trained})
    try:
        for step in range(2):
            sampler.policy.install(updater.rollout_tensors(step))
            groups = []
            for ordinal in (2 * step, 2 * step + 1):
                version = PolicyVersion(epoch=0, step=step)
                task = group_task(config, prompts, "run", ordinal, 1, version)
                sampled = sampler.sample(task)
                scores = scorer.score(sampled.images, [task.prompt] * 4, ordinal=ordinal)
                # Four samples of a good model may all be right: a group without a preference trains nothing.
                graded = {
                    name: tuple(score + 0.01 * place for place, score in enumerate(scored))
                    for name, scored in scores.rewards.items()
                }
                header = GroupHeader(
                    run="run",
                    ordinal=ordinal,
                    attempt=1,
                    version=version,
                    prompt=task.prompt,
                    seeds=task.seeds,
                    rewards=graded,
                    worker="rollout-0",
                    sample_s=0.0,
                    reward_s=0.0,
                )
                sent = encode_group(header, sampled.tensors)
                groups.append(
                    training_group(
                        decode_group(sent.header, sent.payload, sent.sha256, group_id=f"run-{ordinal}")
                    )
                )
            metrics = updater.step(groups, step)
            assert metrics.loss is not None
            assert metrics.grad_norm is not None
            assert metrics.grad_norm > 0
            digests.append(weights_digest(policy.tensors()))
    finally:
        scorer.close()
    assert len(set(digests)) == 2
