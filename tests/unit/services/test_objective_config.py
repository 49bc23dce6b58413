"""Each objective has the keys it heeds and no others; rollouts that do not fit it are refused, with names."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from services.config import (
    OBJECTIVES,
    AnyObjective,
    Config,
    DgpoConfig,
    DiffusionNftConfig,
    FlowGrpoConfig,
    RolloutConfig,
)
from services.config_file import ConfigError, dump_config, load_config, parse_config

ONE_STEP = "learner.optimizer_steps=1"
SDE = "rollout.solver=sde"
USABLE: list[tuple[str, list[str]]] = [
    ("dgpo", ["objective={name: dgpo, beta: 50, kl_cfg: 4.5, reference: frozen, cfg_free: true}"]),
    ("dgpo", ["objective={cfg_free: false}", "rollout.guidance=4.5"]),
    ("dgpo", ["objective={timesteps: {first: null, t_min: 0.3}}", "rollout.solver=heun"]),
    ("dgpo", ["objective={}", "rollout.order=3"]),
    ("flow_grpo", ["objective={name: flow_grpo}", SDE, ONE_STEP]),
    ("flow_grpo", ["objective={name: flow_grpo, clip_range: 1e-3, kl: 0.04}", SDE, ONE_STEP]),
    ("flow_grpo", ["objective={name: flow_grpo}", SDE, ONE_STEP, "rollout.noise_level=1.2"]),
    ("diffusion_nft", ["objective={name: diffusion_nft}"]),
    ("diffusion_nft", ["objective={name: diffusion_nft, beta: 0.1, shared_noise: true, switch_step: null}"]),
]


@pytest.mark.parametrize(("name", "overrides"), USABLE)
def test_an_objective_is_parsed_and_round_trips(name: str, overrides: list[str]) -> None:
    config = load_config("quickstart", overrides)
    assert config.objective.name == name
    assert type(config.objective) is OBJECTIVES[name]
    again = parse_config(yaml.safe_load(dump_config(config)), source="dump")
    assert again == config
    assert type(again.objective) is OBJECTIVES[name]


def test_each_objective_has_an_example_here() -> None:
    assert {name for name, _ in USABLE} == set(OBJECTIVES)


def test_a_section_without_a_name_is_dgpo_s() -> None:
    config = load_config("quickstart", ["objective={kl: 0.5}"])
    assert config.objective == DgpoConfig(kl=0.5)


def test_a_config_may_be_built_of_sections() -> None:
    raw = load_config("quickstart", [SDE, ONE_STEP]).model_dump()
    for objective in (
        DgpoConfig(),
        FlowGrpoConfig(name="flow_grpo"),
        DiffusionNftConfig(name="diffusion_nft"),
    ):
        assert Config.model_validate(raw | {"objective": objective}).objective == objective


KEYS: dict[str, dict[str, Any]] = {
    "dgpo": {"noise_level": 1},
    "flow_grpo": {"beta": 5, "reference": "ema", "switch_step": 3, "shared_noise": True, "cfg_free": True},
    "diffusion_nft": {"clip_range": 0.1, "reference": "ema", "kl_cfg": 3.0},
}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in KEYS.items() for key in keys])
def test_a_key_of_another_objective_is_refused(name: str, key: str) -> None:
    objective = {"name": name, key: KEYS[name][key]}
    with pytest.raises(ConfigError) as refused:
        load_config("quickstart", [f"objective={objective}", SDE, ONE_STEP])
    text = str(refused.value)
    assert f"\n  objective.{key}: unknown key; " in text
    assert f"valid keys: {', '.join(sorted(OBJECTIVES[name].model_fields))}" in text
    assert f"{name}.{key}" not in text


def test_a_misspelt_key_of_an_objective_has_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"\n  objective\.clip_rnge: .*did you mean 'clip_range'"):
        load_config("quickstart", ["objective={name: flow_grpo, clip_rnge: 1}", SDE, ONE_STEP])
    with pytest.raises(ConfigError, match=r"\n  objective\.timesteps\.frist: .*did you mean 'first'"):
        load_config("quickstart", ["objective={name: diffusion_nft, timesteps: {frist: 1}}"])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_value_out_of_range_is_named_without_the_tag(name: str) -> None:
    with pytest.raises(ConfigError, match=r"\n  objective\.kl: .*greater than or equal to 0 \(found -1\)"):
        load_config("quickstart", [f"objective={{name: {name}, kl: -1}}", SDE])


@pytest.mark.parametrize("name", ["grpo", "null", "3", "[dgpo]", "DGPO"])
def test_an_unknown_objective_names_those_that_are_there(name: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config("quickstart", [f"objective.name={name}"])
    text = str(refused.value)
    assert "\n  objective.name: " in text
    assert all(f"'{known}'" in text for known in OBJECTIVES)


@pytest.mark.parametrize("value", ["null", "5", "dgpo", "[dgpo]"])
def test_an_objective_that_is_no_section_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"\n  objective: Input should be a valid dictionary"):
        load_config("quickstart", [f"objective={value}"])


def test_a_name_alone_leaves_the_recipe_s_keys_to_be_refused() -> None:
    with pytest.raises(ConfigError) as refused:
        load_config("quickstart", ["objective.name=flow_grpo", SDE, ONE_STEP])
    for key in ("beta", "reference", "reference_decay"):
        assert f"objective.{key}: unknown key" in str(refused.value)


def test_overrides_build_an_objective_key_by_key() -> None:
    overrides = ["objective={}", "objective.name=flow_grpo", "objective.clip_range=2e-3", SDE, ONE_STEP]
    config = load_config(
        "quickstart", [*overrides, "objective.timesteps.first=5", "objective.timesteps.per_update=2"]
    )
    assert isinstance(config.objective, FlowGrpoConfig)
    assert config.objective.clip_range == 2e-3
    assert (config.objective.timesteps.first, config.objective.timesteps.per_update) == (5, 2)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["rollout.order=3", "rollout.solver=euler"], "rollout: order is for solver 'dpmsolver.*not 'euler'"),
        (["rollout.order=2", SDE], "rollout: order is for solver 'dpmsolver.*not 'sde'"),
        (["rollout.order=1", "rollout.solver=heun"], "rollout: order is for solver 'dpmsolver.*not 'heun'"),
        (["rollout.noise_level=1"], "rollout: noise_level is for solver 'sde', not 'dpmsolver"),
        (["rollout.noise_level=0", SDE], "rollout.noise_level: .*greater than 0"),
        (["rollout.order=4"], "rollout.order: .*less than or equal to 3"),
        (["objective={name: flow_grpo}", ONE_STEP], "set rollout.solver to sde .found 'dpmsolver"),
        (["objective={name: flow_grpo}", ONE_STEP, "rollout.solver=euler"], "'flow_grpo' needs .*'euler'"),
        (
            ["objective={name: flow_grpo}", ONE_STEP, SDE, "rollout.steps=9"],
            "first 9 must be below rollout.steps 9",
        ),
        (
            ["objective={name: flow_grpo}", ONE_STEP, SDE, "rollout.steps=8"],
            "first 9 exceeds rollout.steps 8",
        ),
        (
            ["objective={name: flow_grpo, timesteps: {first: null, t_min: 0.3}}", SDE],
            "timesteps.first None must be below",
        ),
        (
            ["objective={cfg_free: true}", "rollout.guidance=4.5"],
            "rollout.guidance is 4.5: .*set rollout.guidance to 1",
        ),
        (
            ["objective={cfg_free: false}", "rollout.guidance=1"],
            "cfg_free is false .*needs rollout.guidance above 1",
        ),
        (["rewards.0.weight=0"], "rewards: ocr has weight 0 and trains nothing"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_config("quickstart", overrides)


def test_the_last_step_of_other_objectives_may_be_trained() -> None:
    config = load_config("quickstart", ["objective={name: diffusion_nft, timesteps: {first: 10}}", SDE])
    assert config.objective.timesteps.first == config.rollout.steps == 10


def test_a_held_out_reward_may_have_weight_zero() -> None:
    assert load_config("quickstart", ["rewards.1.weight=0"]).rewards[1].heldout


@pytest.mark.parametrize(
    ("objective", "needs_base", "needs_trajectory", "samples_with_reference"),
    [
        (DgpoConfig(), False, False, False),
        (DgpoConfig(kl=0.1, switch_step=3), True, False, True),
        (DgpoConfig(reference="frozen"), True, False, False),
        (FlowGrpoConfig(name="flow_grpo"), False, True, False),
        (FlowGrpoConfig(name="flow_grpo", kl=0.1), True, True, False),
        (DiffusionNftConfig(name="diffusion_nft"), False, False, True),
        (DiffusionNftConfig(name="diffusion_nft", kl=0.1, switch_step=4), True, False, False),
    ],
)
def test_what_an_objective_asks_for(
    objective: AnyObjective, needs_base: bool, needs_trajectory: bool, samples_with_reference: bool
) -> None:
    assert objective.needs_base is needs_base
    assert objective.needs_trajectory is needs_trajectory
    assert objective.samples_with_reference(3) is samples_with_reference


@pytest.mark.parametrize(
    ("overrides", "guides"),
    [
        (["objective={}"], False),
        (["objective={}", "rollout.guidance=4.5"], False),
        (["objective={reference: frozen, kl_cfg: 4.5}"], True),
        (["objective={name: diffusion_nft}", "rollout.guidance=4.5"], False),
        (["objective={name: flow_grpo}", SDE, ONE_STEP], False),
        (["objective={name: flow_grpo}", SDE, ONE_STEP, "rollout.guidance=4.5"], True),
    ],
)
def test_the_learner_guides_where_the_objective_evaluates_under_guidance(
    overrides: list[str], guides: bool
) -> None:
    assert load_config("quickstart", overrides).learner_guides is guides


def test_evaluations_sample_without_noise() -> None:
    sde = load_config(
        "quickstart", [SDE, "rollout.noise_level=1.2", "rollout.guidance=2", "rollout.steps=12"]
    )
    assert sde.evaluation_rollout == RolloutConfig.model_validate(
        sde.rollout.model_dump() | {"solver": "euler", "noise_level": None}
    )
    assert sde.evaluation_rollout.steps == 12
    heun = load_config("quickstart", ["rollout.solver=heun"])
    assert heun.evaluation_rollout == heun.rollout
