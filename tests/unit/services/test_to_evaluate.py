"""What `dgpo eval` takes beside runs and pipelines: hub ids and exported LoRAs; what it says of the rest."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from learner.checkpoint import write_checkpoint
from policy import load_policy
from policy.export import export_lora
from rollout_workers.suite_worker import SuiteWork, SuiteWorker
from services.checkpoint_parts import sha256_of
from services.cli_eval import _default_folder
from services.config import Config, LoraConfig, ModelConfig
from services.config_file import ConfigError, load_config
from services.context import RewardPlace
from services.evaluate import asked, evaluate_model, to_evaluate
from services.exported_lora import LORA, lora_file, read_lora
from services.run_directory import RunDirectory
from services.suites.prompts import load_suite
from services.suites.run import SuiteEvaluation
from services.suites.settings import with_rewards, without_prompts
from tests.recorded_groups import config as recorded_config
from tests.recorded_groups import group, record

COMMIT = "1" * 40
RECIPE = ("model.height=32", "model.width=64", "model.max_sequence_length=1", "model.device=cpu")


@pytest.fixture(scope="module")
def lora(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = ModelConfig(
        path=str(tiny_sd3),
        lora=LoraConfig(rank=3, alpha=5, targets=("attn.to_q", "attn.to_k")),
        device="cpu",
        height=32,
        width=64,
        max_sequence_length=1,
    )
    policy = load_policy(config, text_encoders=False, vae=False, seed=9)
    return export_lora(
        policy, tmp_path_factory.mktemp("export") / "lora", rollout=load_config("quickstart").rollout
    )


@pytest.fixture
def hub(tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model in the cache of the hub's client, and no network."""
    repository = tmp_path / "cache" / "models--acme--tiny"
    shutil.copytree(tiny_sd3, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return "acme/tiny"


def test_a_model_of_the_hub(hub: str) -> None:
    for revision in (None, COMMIT):
        found = to_evaluate(Path(hub), "quickstart", RECIPE, revision=revision)
        assert (found.config.model.path, found.config.model.revision) == (hub, revision)
        assert found.weights is found.kind is None
        assert load_policy(found.config.model, text_encoders=False, vae=False).latent_shape() == (4, 8, 16)
        evaluation = SuiteEvaluation(
            found.config, found.weights, found.kind, load_suite("ocr", found.config), samples=1
        )
        name = f"acme-tiny-{COMMIT}-ocr" if revision else "acme-tiny-ocr"
        assert _default_folder(Path(hub), evaluation) == Path("evaluations") / name
    with pytest.raises(ConfigError, match="acme/tiny is a model of the hub: say --recipe"):
        to_evaluate(Path(hub), None, ())
    with pytest.raises(ConfigError, match=r"'acme/tiny' \(revision v2\).*the model hub cannot be reached"):
        to_evaluate(Path(hub), "quickstart", RECIPE, revision="v2")


def test_an_exported_lora(lora: Path, tiny_sd3: Path) -> None:
    found = to_evaluate(lora, "quickstart", RECIPE)
    model = found.config.model
    assert (found.weights, found.kind, model.path, model.train) == (lora, LORA, str(tiny_sd3), "lora")
    assert model.lora == LoraConfig(rank=3, alpha=5, targets=("attn.to_q", "attn.to_k"))
    policy = load_policy(model, text_encoders=False, vae=False, seed=1)
    before = policy.tensors()
    policy.install(read_lora(lora))
    after = policy.tensors()
    assert not torch.equal(*(next(iter(tensors.values())) for tensors in (before, after)))
    exported = load_policy(model, text_encoders=False, vae=False, seed=9).tensors()
    assert all(torch.equal(after[name], tensor) for name, tensor in exported.items())
    with pytest.raises(ConfigError, match="is a LoRA: say --recipe"):
        to_evaluate(lora, None, ())


def test_a_lora_whose_base_is_elsewhere(lora: Path, tiny_sd3: Path, tmp_path: Path) -> None:
    moved = tmp_path / "lora"
    moved.mkdir()
    about = (
        f'{{"transformer.base_model_name_or_path": "{tmp_path}/gone", "transformer.r": 3, '
        '"transformer.lora_alpha": 5, "transformer.target_modules": ["attn.to_q", "attn.to_k"]}'
    )
    tensors = load_file(lora_file(lora))
    save_file(tensors, lora_file(moved), {"lora_adapter_metadata": about})
    with pytest.raises(ConfigError, match=f"{tmp_path}/gone.*no such directory.*--set model.path=DIR"):
        to_evaluate(moved, "quickstart", RECIPE)
    found = to_evaluate(moved, "quickstart", (*RECIPE, f"model.path={tiny_sd3}"))
    assert found.config.model.path == str(tiny_sd3)
    with pytest.raises(ConfigError, match=f"{tmp_path}/other.*no such directory.*3.5-medium$"):
        to_evaluate(moved, "quickstart", (*RECIPE, f"model.path={tmp_path}/other"))
    for other in ({"format": "pt"}, {"lora_adapter_metadata": "[]"}):
        save_file(tensors, lora_file(moved), other)
        with pytest.raises(
            ConfigError, match="does not say its base_model_name_or_path, r, lora_alpha, target_"
        ):
            to_evaluate(moved, "quickstart", RECIPE)
    lora_file(moved).write_bytes(b"half")
    with pytest.raises(ConfigError, match=r"pytorch_lora_weights.safetensors: cannot be read"):
        to_evaluate(moved, "quickstart", RECIPE)


@pytest.mark.parametrize(
    ("recipe", "overrides", "says"),
    [
        ("quickstart", ["rollout.steps=4"], r"objective\.timesteps\.first"),
        ("quickstart", ["rollout.group_size=12"], "micro_batch"),
        ("quickstart", ["objective.cfg_free=true", "rollout.guidance=4.5"], "cfg_free"),
        ("quickstart", ["rewards.0.deadline_s=900"], r"rollout\.hang_s"),
        (
            "quickstart",
            ["cluster.colocate=true", "queue.max_staleness=0", "rollout.workers=3"],
            "workers sample at the same time",
        ),
        ("quickstart", ["learner.publish_through=nccl", "model.device=cpu"], "publish_through nccl"),
        ("quickstart", ["learner.ranks=64"], "learner.ranks"),
        ("quickstart-flow-grpo", ["rollout.solver=euler"], "needs the likelihoods of stochastic steps"),
        ("quickstart-gamed", ["rewards.1.heldout=false"], "guard.drop"),
    ],
)
def test_what_only_training_reads_does_not_stand_in_the_way(
    tiny_sd3: Path, recipe: str, overrides: list[str], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config(recipe, overrides)
    config = to_evaluate(tiny_sd3, recipe, (*RECIPE, *overrides)).config
    # As a worker gets it.
    config = Config.model_validate_json(without_prompts(with_rewards(config, [])).model_dump_json())
    loaded = load_config(recipe, RECIPE)
    told = {override.partition("=")[0]: override.partition("=")[2] for override in overrides}
    assert config.rollout.steps == int(told.get("rollout.steps", loaded.rollout.steps))
    assert config.rollout.workers == int(told.get("rollout.workers", loaded.rollout.workers))
    assert config.rollout.solver == told.get("rollout.solver", loaded.rollout.solver)
    assert config.rollout.guidance == float(told.get("rollout.guidance", loaded.rollout.guidance))
    assert config.eval.final_prompts == loaded.eval.final_prompts


def test_a_checkpoint_may_be_named_from_within_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = RunDirectory.create(load_config("quickstart", [f"run.directory={tmp_path}"]))
    checkpoint = write_checkpoint(directory.root, 4, {"ema": {"weight": torch.ones(2)}}, {"epoch": 0}, keep=1)
    for place, named in ((checkpoint.parent, "step-4"), (checkpoint, "."), (tmp_path, str(checkpoint))):
        monkeypatch.chdir(place)
        assert to_evaluate(Path(named), None, ()).weights == checkpoint
    elsewhere = (directory.root / "checkpoints").rename(tmp_path / "elsewhere")
    (directory.root / "checkpoints").symlink_to(elsewhere)
    assert to_evaluate(checkpoint, None, ()).weights == checkpoint


def test_a_run_on_a_recording_is_evaluated_by_rewards_that_were_not_recorded(tmp_path: Path) -> None:
    recorded = record(tmp_path / "recording", [group(ordinal) for ordinal in range(2)])
    offline = recorded_config("prompts.source=recorded", f"prompts.path={recorded}", "eval.final_prompts=3")
    config, prompts = asked(offline, ["jpeg"])
    assert [reward.name for reward in config.rewards] == ["jpeg"] and not config.offline
    assert prompts == asked(load_config("quickstart", ["eval.final_prompts=3"]), [])[1]
    with pytest.raises(ConfigError, match="no such scorer"):
        asked(offline, ["jpg"])


def test_rewards_of_the_command_line_may_take_longer_than_those_of_the_recipe(tiny_sd3: Path) -> None:
    short = ("rewards.0.deadline_s=20", "rewards.1.deadline_s=20")
    config = to_evaluate(tiny_sd3, "quickstart", (*RECIPE, *short)).config
    (reward,) = with_rewards(config, ["jpeg"]).rewards
    assert reward.deadline_s > 20


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("rollout.steps=1", r"rollout\.steps: .* greater than or equal to 2"),
        ("rollout.solver=euler", "order is for solver 'dpmsolver"),
        ("eval.path=prompts.txt", "makes its held-out prompts itself"),
        ("rewards.0.app=orc", "did you mean 'ocr'"),
        ("rewards.1.name=ocr", "names must differ"),
        ("rewards.1.nmae=ocr", "did you mean 'name'"),
        # Nothing reads it; all the same it is mistyped.
        ("objective.bta=3", "did you mean 'beta'"),
        ("learner.max_steps=x", r"learner\.max_steps: "),
        ("queue.max_stalenes=0", "did you mean 'max_staleness'"),
    ],
)
def test_what_is_wrong_for_an_evaluation_is_refused(tiny_sd3: Path, override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        to_evaluate(tiny_sd3, "quickstart", (*RECIPE, "rollout.order=2", override))


@pytest.fixture
def other(tiny_sd3: Path, tmp_path: Path) -> Path:
    """A base of the same architecture."""
    base = tmp_path / "other"
    shutil.copytree(tiny_sd3, base)
    file = base / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(file).items()}, file)
    return base


def test_a_lora_is_not_put_on_another_base_unasked(lora: Path, other: Path, tmp_path: Path) -> None:
    on_other = (*RECIPE, f"model.path={other}")
    says = f"{lora} was not trained on the model at {other}, .*--set model.path=DIR.*--other-base"
    with pytest.raises(ConfigError, match=says):
        to_evaluate(lora, "quickstart", on_other)
    found = to_evaluate(lora, "quickstart", on_other, other_base=True)
    assert (found.config.model.path, found.base_digest) == (str(other), None)
    # One of an older version did not say.
    old = tmp_path / "old"
    old.mkdir()
    with safe_open(lora_file(lora), "pt") as opened:
        about = {"lora_adapter_metadata": opened.metadata()["lora_adapter_metadata"]}
    save_file(load_file(lora_file(lora)), lora_file(old), about)
    assert to_evaluate(old, "quickstart", on_other).base_digest is None
    for model in (other, Path("acme/tiny")):
        with pytest.raises(ConfigError, match=f"--other-base: for an exported LoRA, and {model} is none"):
            to_evaluate(model, "quickstart", RECIPE, other_base=True)


def test_a_base_that_is_not_here_yet_is_seen_when_it_is_loaded(
    lora: Path, tiny_sd3: Path, other: Path, hub: str
) -> None:
    """In this process, before anything is started; and in a worker, whose node may have another one there."""
    on_hub = (*RECIPE, f"model.path={hub}")
    found = to_evaluate(lora, "quickstart", on_hub)
    assert found.base_digest is not None
    # The one that it was trained on.
    work = SuiteWork(
        config=found.config,
        rewards=dict.fromkeys(("ocr", "tesseract"), RewardPlace(url="http://127.0.0.1:1")),
        weights=lora,
        kind=LORA,
        digest=sha256_of(lora_file(lora)),
        base_digest=found.base_digest,
    )
    SuiteWorker(work.model_dump_json())
    snapshot = other.parent / "cache" / "models--acme--tiny" / "snapshots" / COMMIT
    shutil.copytree(other, snapshot, dirs_exist_ok=True)
    with pytest.raises(ConfigError, match=f"not trained on the model at {hub}"):
        SuiteWorker(work.model_dump_json())
    with pytest.raises(ConfigError, match=f"not trained on the model at {hub}"):
        evaluate_model(lora, "quickstart", "ema", on_hub, Console())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_lora_that_is_no_number_is_not_scored(lora: Path, tmp_path: Path, value: float) -> None:
    tensors = load_file(lora_file(lora))
    name = sorted(tensors)[1]
    tensors[name][0, 0] = value
    save_file(tensors, lora_file(tmp_path))
    with pytest.raises(ConfigError, match=f"1 of {len(tensors)} weights are not finite.*of them {name}"):
        read_lora(tmp_path)


def test_what_is_nothing_to_evaluate(
    lora: Path, tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "one" / "lora").mkdir(parents=True)
    # A folder `runs` is here: no organisation of the hub.
    for place, says in (
        ("runs/mistyped", r"neither a run directory.* nor a hub id \(ORGANISATION/NAME\)$"),
        ("mistyped", "neither a run directory"),
        ("runs/one", "it has lora in it: give one of them"),
    ):
        with pytest.raises(ConfigError, match=says):
            to_evaluate(Path(place), "quickstart", RECIPE)
    with pytest.raises(ConfigError, match=r"--revision v2: for a model of the hub, and .* is none"):
        to_evaluate(tiny_sd3, "quickstart", RECIPE, revision="v2")
    with pytest.raises(ConfigError, match="--weights 'best': ema or policy"):
        to_evaluate(tiny_sd3, "quickstart", RECIPE, weights="best")
