"""A configuration is refused with the place, what was found and what would be valid; or it is used whole."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from services.config import DiffusionNftConfig
from services.config_file import PROJECT_ROOT, ConfigError, dump_config, load_config, parse_config

RECIPES = sorted((PROJECT_ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid_and_round_trips(recipe: Path) -> None:
    config = load_config(recipe)
    assert parse_config(yaml.safe_load(dump_config(config)), source="dump") == config


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("learner.max_step=3", ["learner.max_step", "unknown key", "did you mean 'max_steps'"]),
        ("rewards.0.wieght=1", ["rewards.0.wieght", "'weight'"]),
        ("queue.max_staleness=-1", ["queue.max_staleness", "greater than or equal to 0", "-1"]),
        ("rollout.group_size=many", ["rollout.group_size", "valid integer", "'many'"]),
        ("learner={micro_batch: auto, activation_offload: true}", ["host memory", "give a number"]),
        ("learner.micro_batch=24", ["micro_batch 24", "group_size 16"]),
        ("objective.timesteps.per_update=9", ["per_update 9 exceeds the 6 steps"]),
        ("learner.betas=[0.9, 1]", ["learner.betas", "less than 1"]),
        ("model.lora.targets=[]", ["model.lora.targets", "at least 1"]),
        ("learner.optimizer_steps=3", ["optimizer_steps 3 must divide", "per_update 4"]),
        ("learner.ranks=9", ["learner.ranks 9 exceeds learner.groups_per_step 8"]),
        ("model.device=cuda:1", ["would put all of 2 ranks on one GPU"]),
        ("learner.sharding=fsdp", ["sharding fsdp divides the weights of several ranks: set learner.ranks"]),
        ("model.train=lora", ["sharding fsdp is for full fine-tuning: set model.train to full"]),
        ("learner.num_gpus=0.5", ["sharding fsdp with learner.num_gpus 0.5", "set it to 1"]),
        ("learner.optimizer=adamw8bit", ["sharding fsdp with learner.optimizer adamw8bit", "to adamw"]),
        ("learner.micro_batch=auto", ["sharding fsdp with learner.micro_batch auto", "to a number"]),
        ("model.compile=true", ["sharding fsdp with model.compile", "set compile to false"]),
        ("learner.publish_through=nfs", ["learner.publish_through", "'object_store', 'shared_directory'"]),
        ("learner.ranks=0", ["learner.ranks", "greater than or equal to 1"]),
        ("objective.switch_step=5", ["objective"]),
        ("rewards.0.heldout=true", ["every reward is held out"]),
        ("rewards.1.name=ocr", ["names must differ"]),
        ("rewards.0.url=http://localhost:1", ["either app or url"]),
        ("prompts.source=file", ["needs a path"]),
        ("queue.max_groups=4", ["cannot hold"]),
        ("run.name=../evil", ["run.name"]),
        ("model=null", ["model"]),
        ("objective={name: dgpo, reference: frozen, clip_range: null, reference_of: rollout}", ["no effect"]),
        ("rewards=[]", ["rewards", "at least 1"]),
        ("rollout.solver=heunn", ["rollout.solver", "'euler'", "did you mean 'heun'?"]),
        ("objective.reference=x", ["objective.reference", "'x' is none of 'frozen' or 'ema'"]),
        ("rewards.0.app=ocrr", ["rewards.0.app", "'ocrr'", "did you mean 'ocr'?", "ocr_tesseract"]),
        ("rewards.0.range=[1, 0]", ["range [1.0, 0.0] must go up", "make weight negative"]),
        ("rewards.1.range=[0, 1]", ["range is for the total reward"]),
        ("rewards.2.weight=1", ["'2' is not an index", "valid are 0 to 1"]),
    ],
)
def test_an_unusable_value_is_named(override: str, named: list[str]) -> None:
    if override == "model.device=cuda:1":
        overrides = [override, "learner.ranks=2"]
    elif "fsdp with" in named[0] or override == "model.train=lora":
        overrides = [override, "learner.ranks=2", "learner.sharding=fsdp"]
    elif override == "objective.switch_step=5":
        overrides = [override, "objective.reference=frozen"]
        named = ["switch_step needs reference 'ema'"]
    else:
        overrides = [override]
    with pytest.raises(ConfigError) as refused:
        load_config("quickstart", overrides)
    for text in named:
        assert text in str(refused.value)


@pytest.mark.parametrize("override", ["learner", "=1", "a..b=1", "rewards.7.weight=1", "run.name.deep=1"])
def test_a_malformed_override_is_named(override: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        load_config("quickstart", [override])


ELSEWHERE = "rewards=[{name: ocr, url: 'http://127.0.0.1:1', %s}]"


@pytest.mark.parametrize(
    "given",
    ["args: {width: 320}", "replicas: 2", "max_replicas: 2", "threads: 2", "num_cpus: 1", "num_gpus: 0.5"],
)
def test_settings_of_an_app_are_refused_for_a_reward_that_is_elsewhere(given: str) -> None:
    with pytest.raises(ConfigError, match=f"rewards.0: .*'ocr': {given.split(':')[0]} would do nothing"):
        load_config("quickstart", [ELSEWHERE % given])


def test_a_range_without_effect_is_refused() -> None:
    overrides = ["rewards.0.range=[20, 24]", "advantage.combine=normalized"]
    with pytest.raises(ConfigError, match="range of ocr would do nothing"):
        load_config("quickstart", overrides)


def test_activations_that_are_offloaded_are_not_those_of_compiled_code() -> None:
    overrides = ["learner.activation_offload=true", "model.compile=true"]
    for alone in overrides:
        load_config("quickstart", [alone])
    with pytest.raises(ConfigError, match=r"activation_offload with model\.compile: .* one of them to false"):
        load_config("quickstart", overrides)


def test_a_reward_scales_up_and_not_down() -> None:
    scaled = load_config("quickstart", ["rewards.0.replicas=2", "rewards.0.max_replicas=4"]).rewards[0]
    assert (scaled.replicas, scaled.max_replicas) == (2, 4)
    with pytest.raises(ConfigError, match="max_replicas 1 is less than replicas 2"):
        load_config("quickstart", ["rewards.0.replicas=2", "rewards.0.max_replicas=1"])


def test_a_reward_that_is_elsewhere_round_trips_through_the_run_directory() -> None:
    config = load_config("quickstart", [ELSEWHERE % "token_env: TOKEN, num_cpus: 0.5"])
    assert parse_config(yaml.safe_load(dump_config(config)), source="dump") == config


LOGINS = "{driver: {password_env: P}, learner: {password_env: P}, worker: {password_env: P}}"


def test_a_mistyped_key_of_a_login_is_named() -> None:
    changes = [f"queue.logins={LOGINS}", "queue.url=redis://db", "queue.logins.driver.pasword_env=P"]
    with pytest.raises(ConfigError, match=r"driver\.pasword_env: unknown key; did you mean 'password_env'"):
        load_config("quickstart", changes)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["rewards.0.token_env=TOKEN"], "token_env is for url"),
        (["queue.password_env=PASSWORD"], "password_env is for url"),
        (["queue.server=/bin/valkey", "queue.url=redis://db"], "server is for the embedded server"),
        (["rollout.hang_s=60"], "deadline_s of ocr, tesseract must be less than rollout.hang_s 60"),
        ([f"queue.logins={LOGINS}"], "logins are for url"),
        (["queue.logins={driver: {password_env: P}}", "queue.url=redis://db"], "leaves out learner, worker"),
        ([f"queue.logins={LOGINS}", "queue.url=redis://run@db"], "and of a user in url"),
        ([f"queue.logins={LOGINS}", "queue.url=redis://db", "queue.password_env=P"], "place of password_env"),
    ],
)
def test_a_secret_that_nobody_asks_for_is_refused(overrides: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_config("quickstart", overrides)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("rewards=[{name: ocr, url: 'https://worker:hunter2@rewards/ocr'}]", "token_env"),
        ("rewards=[{name: ocr, url: 'https://hunter2@rewards/ocr'}]", "token_env"),
        ("queue.url=rediss://worker:hunter2@db:6380/0", "password_env"),
        ("queue.url=redis://:hunter2@db", "password_env"),
        ("queue.url=redis://db?password=hunter2", "password_env"),
    ],
)
def test_credentials_in_an_address_are_refused_and_not_shown(override: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as refused:
        load_config("quickstart", [override])
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["queue.tls_ca=ca.pem"], r"queue: tls_ca is for a url that begins with rediss://, not for none"),
        (["queue.url=redis://db", "queue.tls_ca=ca.pem"], r"with rediss://, not for redis://db"),
        (["queue.url=unix:///db", "queue.tls_ca=ca.pem"], r"with rediss://, not for unix:///db"),
        (["queue.url=rediss://db?ssl_cert_reqs=none"], "ssl_cert_reqs is no option .* always verified"),
        (["queue.url=rediss://db?ssl_check_hostname="], "ssl_check_hostname is no option"),
        (["rewards.0.tls_ca=ca.pem"], "reward 'ocr': tls_ca is for url; leave it out: app is served on loop"),
        (
            ["rewards=[{name: ocr, url: 'http://rewards', tls_ca: ca.pem}]"],
            "reward 'ocr': tls_ca is for a url that begins with https://",
        ),
    ],
)
def test_an_authority_is_for_tls_and_tls_is_verified(overrides: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_config("quickstart", overrides)


def test_the_file_of_an_authority_is_sought_where_the_run_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And need not be there where a configuration is only read, as on another node."""
    monkeypatch.chdir(tmp_path)
    elsewhere = "rewards=[{name: ocr, url: 'https://rewards', tls_ca: ca.pem}]"
    config = load_config("quickstart", ["queue.url=rediss://db", "queue.tls_ca=ca.pem", elsewhere])
    assert config.queue.tls_ca == config.rewards[0].tls_ca == tmp_path / "ca.pem"
    monkeypatch.chdir("/")
    assert parse_config(yaml.safe_load(dump_config(config)), source="dump") == config


def test_the_address_of_the_queue_may_name_an_acl_user() -> None:
    config = load_config("quickstart", ["queue.url=rediss://worker@db:6380/0", "queue.password_env=PASSWORD"])
    assert config.queue.url == "rediss://worker@db:6380/0"


def test_an_unknown_recipe_lists_the_shipped_ones() -> None:
    with pytest.raises(ConfigError, match="quickstart"):
        load_config("quickstrat")


def test_yaml_that_is_none_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("run: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(broken)
    broken.write_bytes(b"run: \xff\xfe")
    with pytest.raises(ConfigError, match=r"broken.yaml: not valid YAML"):
        load_config(broken)
    broken.write_text("run: {name: 2024-13-45}")
    with pytest.raises(ConfigError, match=r"broken.yaml: not valid YAML"):
        load_config(broken)
    broken.write_text("- a list")
    with pytest.raises(ConfigError, match="mapping of sections"):
        load_config(broken)


def test_python_objects_in_yaml_are_not_made(tmp_path: Path) -> None:
    evil = tmp_path / "evil.yaml"
    evil.write_text("run: !!python/object/apply:os.system ['true']")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(evil)


def test_mode_2a_is_cfg_free() -> None:
    with pytest.raises(ConfigError, match="CFG-free"):
        load_config(
            "quickstart", ["objective.reference=frozen", "objective.kl_cfg=4.5", "rollout.guidance=4.5"]
        )


@given(step=st.integers(1, 10**6), rate=st.floats(1e-8, 1.0))
def test_overrides_arrive_as_they_are(step: int, rate: float) -> None:
    config = load_config("quickstart", [f"learner.max_steps={step}", f"learner.learning_rate={rate!r}"])
    assert (config.learner.max_steps, config.learner.learning_rate) == (step, rate)


def test_a_recipe_extends_another(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "extends: quickstart\nlearner: {max_steps: 7}\nrewards: [{name: taste, app: ocr}]\n"
    )
    config, base = load_config(tmp_path / "mine.yaml", ["run.seed=3"]), load_config("quickstart")
    assert config.learner == base.learner.model_copy(update={"max_steps": 7})
    assert [reward.name for reward in config.rewards] == ["taste"]
    assert config.objective == base.objective
    assert config.run.seed == 3
    (tmp_path / "other.yaml").write_text("extends: mine.yaml\nobjective: {name: diffusion_nft, kl: 0.5}\n")
    other = load_config(tmp_path / "other.yaml")
    assert other.learner.max_steps == 7
    assert other.objective == DiffusionNftConfig(name="diffusion_nft", kl=0.5)
    # One that does not name itself, or has the same name, is merged.
    (tmp_path / "again.yaml").write_text("extends: other.yaml\nobjective: {beta: 0.25}\n")
    again = load_config(tmp_path / "again.yaml").objective
    assert again == DiffusionNftConfig(name="diffusion_nft", kl=0.5, beta=0.25)
    (tmp_path / "beta.yaml").write_text("extends: quickstart\nobjective: {beta: 7}\n")
    beta = load_config(tmp_path / "beta.yaml").objective
    assert beta == base.objective.model_copy(update={"beta": 7})


def test_what_cannot_be_extended_is_named(tmp_path: Path) -> None:
    for text, named in (
        ("extends: [a]\n", "extends: expected the name of a recipe or a YAML file, found"),
        ("extends: nowhere\n", "no recipe 'nowhere'"),
        ("extends: a.yaml\n", "a.yaml is extended by itself"),
        ("extends: b.yaml\n", "a.yaml is extended by itself"),
    ):
        (tmp_path / "a.yaml").write_text(text)
        (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
        with pytest.raises(ConfigError, match=re.escape(named)):
            load_config(tmp_path / "a.yaml")


def test_a_scorer_of_another_package_is_named_by_where_it_is() -> None:
    config = load_config("quickstart", ["rewards.0.app=benchmarks.timed_scorer:create"])
    assert config.rewards[0].app == "benchmarks.timed_scorer:create"
    with pytest.raises(
        ConfigError, match=r"rewards\.0\.app: there is no scorer 'no\.such:create'.*module:create"
    ):
        load_config("quickstart", ["rewards.0.app=no.such:create"])


ONE_CARD = ("cluster.colocate=true", "queue.max_staleness=0", "rollout.workers=1")


def test_parts_on_one_card_take_turns_and_wait_for_an_evaluation_too() -> None:
    alone, sharing = load_config("quickstart"), load_config("quickstart", ONE_CARD)
    assert alone.groups_deadline_s == alone.queue.take_deadline_s
    assert sharing.groups_deadline_s == sharing.queue.take_deadline_s + sharing.eval.deadline_s
    shares = ("learner.num_gpus=0.4", "rollout.num_gpus=0.4", "eval.num_gpus=0.2")
    load_config("quickstart", [*ONE_CARD, *shares])


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "queue.max_staleness=1",
            "queue.max_staleness 0, not 1: who trains and who samples take turns",
        ),
        ("learner.ranks=2", "needs learner.ranks 1, not 2"),
        ("rollout.workers=2", "needs rollout.workers 1, not 2"),
        ("model.compile=true", "needs model.compile False"),
        ("learner.publish_through=process_groups", "the learner would wait in its turn"),
        ("learner.publish_through=nccl", "publish_through nccl: the learner would wait in its turn"),
        ("learner.num_gpus=0.5", "rollout.num_gpus, eval.num_gpus is 0"),
    ],
)
def test_what_cannot_take_turns_is_refused(override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.colocate") as caught:
        load_config("quickstart", [*ONE_CARD, override])
    assert says in str(caught.value)


def test_shares_of_one_card_are_not_more_than_one() -> None:
    shares = ("learner.num_gpus=0.6", "rollout.num_gpus=0.6", "eval.num_gpus=0.2")
    with pytest.raises(ConfigError, match=r"add up to 1\.4, which takes more than one card"):
        load_config("quickstart", [*ONE_CARD, *shares])


@pytest.mark.parametrize("recipe", ["quickstart", "quickstart-shapes"])
def test_prompts_that_make_their_own_held_out_ones_take_no_file_of_them(recipe: str) -> None:
    with pytest.raises(ConfigError, match="makes its held-out prompts itself: leave it out"):
        load_config(recipe, ["eval.path=heldout.txt"])
