"""`dgpo plan`: its arithmetic by hand, what it promises of every split, and what it refuses."""

from __future__ import annotations

import heapq
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from policy import load_policy
from reward_servers.wire import encode_tensors
from services.cli import app
from services.codec import encode_group
from services.config_file import ConfigError, load_config
from services.messages import GroupHeader, PolicyVersion, Prompt
from services.planning.local import architecture
from services.planning.plan import Costs, costs_of, make_plan
from services.planning.published import PassCost, Published, pass_cost
from services.planning.show import _settings, as_json
from services.planning.step import Requests, Shape, Split, Times, predict
from services.planning.traffic import Machine, group_bytes, weights_bytes

RECIPE = "sd35-medium-geneval-8gpu"
ROUND = PassCost(
    parameters=2_000_000_000, trained=40_000_000, forward=10**12, train=3 * 10**12, activations=3 * 10**9
)
"""Round numbers near those of SD3.5-medium, which take half a minute to count."""


def costs(*overrides: str, counted: PassCost = ROUND, machine: Machine | None = None) -> Costs:
    config = load_config(RECIPE, overrides)
    return costs_of(config, architecture(config.model), machine or Machine(), counted=counted)


def test_gpu_seconds_by_hand() -> None:
    found = costs()
    # 24 groups of 24; ten steps, guided; four timesteps, each with a reference, a base and one more for a
    # group in pieces.
    images = 24 * 24
    assert found.work.images == images
    assert found.rollout_gpu_s == pytest.approx(images * 10 * 2 * 1e12 / 300e12)
    assert found.learner_gpu_s == pytest.approx(images * 4 * (3 + 3) * 1e12 / 300e12)
    # Mask2Former and four crops through CLIP, float32.
    assert found.reward_s(on_gpu=True) == pytest.approx(images * (626e9 + 4 * 170e9) / 30e12)
    assert found.reward_s(on_gpu=False) == 0


def test_bytes_by_hand() -> None:
    found = costs()
    latents, condition = 24 * 16 * 64 * 64 * 4, (333 * 4096 + 2048) * 2
    assert group_bytes(found.config, found.model) == pytest.approx(latents + condition, rel=0.001)
    assert weights_bytes(found.config, ROUND) == 160_000_000
    halved = costs("learner.publish_dtype=bfloat16")
    assert weights_bytes(halved.config, ROUND) == 80_000_000
    one_node = make_plan(found, 8)
    assert found.traffic(one_node.split).network == 0
    two_nodes = found.traffic(Split(workers=8, ranks=8))
    group = group_bytes(found.config, found.model)
    # In and out of the queue, seven of eight shares to other ranks, and the weights to one node of workers.
    assert two_nodes.network == pytest.approx(24 * group * (2 + 7 / 8) + 160e6)


def test_a_group_has_the_bytes_that_are_said() -> None:
    config = load_config("quickstart")
    policy = load_policy(config.model, text_encoders=True, vae=False)
    size = config.rollout.group_size
    header = GroupHeader(
        run="run",
        ordinal=0,
        attempt=1,
        version=PolicyVersion(epoch=0, step=0),
        prompt=Prompt(text="K7QX"),
        seeds=tuple(range(10**8, 10**8 + size)),
        rewards={"ocr": (0.123456789,) * size},
        worker="rollout-0",
        sample_s=1.0,
        reward_s=1.0,
    )
    condition = {f"condition.{name}": tensor for name, tensor in policy.encode("K7QX").items()}
    latents = torch.zeros(size, *policy.latent_shape())
    encoded = encode_group(header, {"latents": latents, **condition})
    assert group_bytes(config, architecture(config.model)) == pytest.approx(encoded.size, rel=0.05)


def test_a_local_model_is_counted_from_its_own_configuration() -> None:
    config = load_config("quickstart")
    policy = load_policy(config.model, text_encoders=False, vae=False)
    model = architecture(config.model)
    counted = pass_cost(model, config.model.height, config.model.width, None)
    assert counted.parameters == sum(parameter.numel() for parameter in policy.transformer.parameters())
    assert model.latents(32, 64) == torch.Size(policy.latent_shape()).numel()


def test_a_flux_without_embedded_guidance_is_counted() -> None:
    """FLUX.1-schnell."""
    dev = Published.named("flux-dev")
    small = {**dev.config, "num_layers": 1, "num_single_layers": 1}
    counted = [
        pass_cost(replace(dev, config=small | {"guidance_embeds": embeds}), 64, 64, None)
        for embeds in (True, False)
    ]
    assert counted[0].parameters > counted[1].parameters
    assert counted[0].forward > counted[1].forward > 0


TIMES = Times(sample=10.0, scores={"ocr": 2.0}, update=3.0, install=1.0, take=0.5, gather=0.25, publish=0.25)


def test_a_step_that_overlaps_is_its_longest_part() -> None:
    step = predict(Shape(groups=8, staleness=1), TIMES, Split(workers=4, ranks=4, replicas={"ocr": 2}))
    assert step.parts == {
        "rollout": 2 * 10 + 1,
        "learner": 0.5 + 2 * 3 + 0.25 + 0.25,
        "rewards": 8 * 2 / 2,
        "proxy": 0,
        "queue": 0,
        # An install, two rounds of sampling, four workers at two replicas, and the learner: in two updates.
        "turnaround": (1 + 20 + 4 + 7) / 2,
    }
    assert (step.seconds, step.bottleneck) == (21, "rollout")


def test_a_step_without_staleness_is_the_sum() -> None:
    step = predict(Shape(groups=8, staleness=0), TIMES, Split(workers=4, ranks=4, replicas={"ocr": 2}))
    assert step.seconds == 1 + 20 + 4 + 7
    assert step.bottleneck == "rollout"


def test_replicas_share_a_group_that_is_scored_in_several_requests() -> None:
    shape, split = Shape(groups=8, staleness=1), Split(workers=4, ranks=4, replicas={"ocr": 12})
    whole = predict(shape, TIMES, split)
    divided = predict(shape, replace(TIMES, requests={"ocr": Requests(images=16, each=4)}), split)
    # A replica for each worker's group; or three, one of which has two of its four requests.
    assert (whole.parts["rewards"], divided.parts["rewards"]) == (8 * 2 / 4, 8 * 2 / 12)
    assert whole.parts["turnaround"] - divided.parts["turnaround"] == pytest.approx((2 - 2 / 4 * 2) / 2)


@pytest.mark.parametrize(
    ("replicas", "seconds"),
    # 10 + 10 + 4 images, a second each: one after the other; 10 + 4 beside 10; all at once.
    [(1, 24), (2, 14), (3, 10), (9, 10)],
)
def test_the_last_request_of_a_group_may_be_smaller(replicas: int, seconds: int) -> None:
    plan = costs("rewards=[{name: slow, app: ocr, images_per_request: 10}]", "rollout.group_size=24")
    asked = plan.times(Split(workers=1, ranks=1)).requests
    assert asked == {"slow": Requests(images=24, each=10)}
    times = Times(sample=0.0, scores={"slow": 24.0}, update=0.0, requests=asked)
    step = predict(
        Shape(groups=1, staleness=0), times, Split(workers=1, ranks=1, replicas={"slow": replicas})
    )
    assert step.parts["turnaround"] == seconds
    # More replicas than the largest request has use for do not bring scores sooner.
    assert step.parts["rewards"] == max(24 / replicas, 10)


@given(
    groups=st.integers(1, 12),
    images=st.integers(2, 32),
    each=st.integers(1, 40),
    replicas=st.integers(1, 40),
)
def test_requests_are_as_long_as_if_each_free_replica_took_the_largest(
    groups: int, images: int, each: int, replicas: int
) -> None:
    requests = Requests(images, each)
    sizes = sorted([each] * requests.whole + [requests.last] * bool(requests.last), reverse=True)
    assert (len(sizes), sum(sizes)) == (requests.count, images)
    free = [0] * replicas
    for size in sorted(sizes * groups, reverse=True):
        heapq.heapreplace(free, free[0] + size)
    told = requests.rounds(groups, replicas) * images
    assert max(free) - 1e-6 <= told <= max(free) + requests.last + 1e-6


def test_a_plan_has_replicas_for_the_requests_of_a_group() -> None:
    slow = ["rewards=[{name: slow, app: ocr, args: {detect: true}, images_per_request: 4}]"]
    found = make_plan(costs(*slow, "rollout.group_size=24"), 8)
    assert found.split.workers < found.split.replicas["slow"] <= 6 * found.split.workers
    assert found.step.bottleneck != "rewards"


def test_images_of_served_rewards_go_through_one_proxy() -> None:
    served = (
        "rewards=[{name: a, app: ocr}, {name: b, app: jpeg, heldout: true, every: 4}, {name: c, url: %s}]"
    )
    found = costs(served % "'http://127.0.0.1:9/'")
    body = len(encode_tensors(np.zeros((24, 512, 512, 3), np.uint8), "p"))
    assert found.traffic(Split(workers=4, ranks=4)).images == pytest.approx(24 * body * 1.25, rel=0.001)


def test_a_proxy_that_holds_all_up_is_told() -> None:
    slow = replace(Machine(), proxy_bytes_s=1e6)
    plan = make_plan(costs(machine=slow), 8)
    assert plan.step.seconds >= plan.step.parts["proxy"] > 400
    assert any("through Serve's one proxy, at 1 MB/s" in note for note in plan.notes)
    assert not any("proxy" in note for note in make_plan(costs(), 8).notes)


def test_one_gpu_takes_turns() -> None:
    found = costs("learner.micro_batch=8")
    plan = make_plan(found, 1)
    assert plan.split.colocated and plan.split.gpus == 1
    busy = found.rollout_gpu_s + found.learner_gpu_s + found.reward_s(on_gpu=True)
    assert plan.step.seconds == pytest.approx(busy, rel=0.05)


@pytest.mark.parametrize("staleness", [0, 1, 4])
@pytest.mark.parametrize("groups", [8, 24])
def test_more_gpus_are_never_slower(staleness: int, groups: int) -> None:
    found = costs(f"queue.max_staleness={staleness}", f"learner.groups_per_step={groups}", "learner.ranks=1")
    plans = [make_plan(found, count) for count in range(1, 40)]
    seconds = [plan.step.seconds for plan in plans]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[-1] < seconds[0] / 5
    for plan in plans:
        assert plan.split.gpus + plan.idle == plan.gpus
        assert plan.split.ranks <= groups
        assert all(1 <= count <= plan.split.workers for count in plan.split.replicas.values())


def test_what_more_gpus_do_not_help_stays_idle_and_is_told() -> None:
    plan = make_plan(costs(), 512)
    assert plan.idle > 400
    assert any("raise learner.groups_per_step" in note for note in plan.notes)


def test_a_reward_that_has_no_room_beside_a_worker_gets_a_gpu() -> None:
    plan = make_plan(costs("learner.micro_batch=4", machine=Machine(gpu_gib=29.0)), 8)
    assert plan.split.reward_gpus == plan.split.replicas["geneval"] >= 1
    assert plan.split.gpus <= 8


def test_an_evaluator_that_has_no_room_beside_a_worker_gets_the_gpu_and_its_name() -> None:
    """No reward is on a GPU."""
    overrides = "learner.micro_batch=4", "eval.num_gpus=1", "rewards.0.num_gpus=0"
    found = costs(*overrides, machine=Machine(gpu_gib=20.0))
    assert not any(one.on_gpu for one in found.rewards)
    plan = make_plan(found, 8)
    assert plan.split.reward_gpus == 1 and plan.split.gpus <= 8
    assert "beside them 1 GPU for the evaluator" in _settings(plan)
    with pytest.raises(ConfigError, match=r"1 learner rank \+ 1 for the evaluator = 3 GPUs"):
        make_plan(found, 2)


def test_too_few_gpus_are_refused_with_the_sum() -> None:
    full = replace(ROUND, trained=ROUND.parameters)
    found = costs("model.train=full", "learner.micro_batch=2", counted=full)
    with pytest.raises(ConfigError, match=r"1 worker \+ 1 learner rank = 2 GPUs") as refused:
        make_plan(found, 1)
    sums = f"{found.memory.rank:.1f} + {found.memory.activations:.1f} of activations"
    assert sums in str(refused.value)
    assert make_plan(found, 2).split.gpus == 2
    sharded = costs("model.train=full", "learner.micro_batch=2", "learner.sharding=fsdp", counted=full)
    with pytest.raises(ConfigError, match=r"1 worker \+ 2 learner ranks = 3 GPUs"):
        make_plan(sharded, 2)


def test_a_rank_that_no_gpu_holds_is_refused_with_what_would_fit() -> None:
    with pytest.raises(ConfigError, match=r"Set learner.micro_batch=\d+: it is 24"):
        make_plan(costs("learner.micro_batch=24", machine=Machine(gpu_gib=40.0)), 8)
    large = replace(ROUND, parameters=8 * 10**9, trained=8 * 10**9)
    with pytest.raises(ConfigError, match=r"learner\.sharding=fsdp"):
        make_plan(costs("model.train=full", counted=large), 8)


def test_unknown_models_and_rewards_are_told() -> None:
    config = load_config(RECIPE, ["model.path=nobody/knows"])
    with pytest.raises(ConfigError, match=r"stabilityai/stable-diffusion-3\.5-medium"):
        architecture(config.model)
    config = load_config(RECIPE)
    with pytest.raises(ConfigError, match="no such reward, only geneval"):
        costs_of(config, architecture(config.model), Machine(), {"ocr": 0.1}, ROUND)
    silent = costs("rewards=[{name: judge, url: 'http://127.0.0.1:1'}]")
    assert any("judge=SECONDS" in note for note in make_plan(silent, 8).notes)


def test_given_seconds_take_the_place_of_known_ones() -> None:
    config = load_config(RECIPE)
    model = architecture(config.model)
    slow = make_plan(costs_of(config, model, Machine(), {"geneval": 1.0}, ROUND), 8)
    assert as_json(slow)["update"]["reward_gpu_s"] == 576
    assert slow.step.seconds > 3 * make_plan(costs(), 8).step.seconds


def test_the_command_says_what_is_assumed() -> None:
    done = CliRunner().invoke(app, ["plan", "quickstart", "--gpus", "2", "--json", "--tflops", "1"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["assumed"]["tflops"] == 1
    assert result["split"]["workers"] == result["split"]["ranks"] == 1
    assert result["seconds"] == max(result["bounds"].values())


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--tflops", "0"), "above 0"),
        (("--reward-seconds", "ocr"), "REWARD=SECONDS"),
        (("--reward-seconds", "ocr=-1"), "above 0"),
    ],
)
def test_numbers_that_cannot_be_are_refused(option: tuple[str, str], said: str) -> None:
    done = CliRunner().invoke(app, ["plan", "quickstart", "--gpus", "2", *option])
    assert isinstance(done.exception, ConfigError)
    assert said in str(done.exception)
