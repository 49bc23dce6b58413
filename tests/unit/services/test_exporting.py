"""An export says what it is, and only a run's own one is ever replaced."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from diffusers import SD3Transformer2DModel

from learner.checkpoint import write_checkpoint
from policy import load_policy
from services.config import Config
from services.config_file import ConfigError, load_config
from services.exporting import ExportError, _written, export_into, export_run, exported_part
from services.metrics import Estimate, EvalRow, UpdateRow, When
from services.run_directory import RunDirectory
from services.telemetry import Telemetry


@pytest.fixture
def run(tmp_path: Path, tiny_sd3: Path) -> RunDirectory:
    config = load_config("quickstart", [f"run.directory={tmp_path}", f"model.path={tiny_sd3}"])
    run = RunDirectory.create(config)
    checkpoint(run, 3)
    evaluation(run, 3)
    return run


def checkpoint(run: RunDirectory, step: int) -> None:
    policy = load_policy(run.config().model, text_encoders=False, vae=False, base=False, seed=0)
    weights = {name: parameter.detach() for name, parameter in policy.trainable().items()}
    write_checkpoint(run.root, step, {"policy": weights, "ema": weights}, {"epoch": 0}, keep=2)


def evaluation(
    run: RunDirectory, step: int, when: When = "after", *, ocr: float = 0.5, prompts: int = 1
) -> None:
    row = EvalRow(
        time=time.time(),
        when=when,
        epoch=0,
        step=step,
        prompts=prompts,
        rewards={"ocr": Estimate(mean=ocr), "tesseract": Estimate(mean=0.25, se=0.125)},
        exact={"ocr": Estimate(mean=ocr / 2, se=0.0625)},
    )
    with Telemetry(run.root, tensorboard=False) as telemetry:
        telemetry.write(row)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def card(folder: Path) -> str:
    return (folder / "pipeline" / "README.md").read_text()


def test_the_device_of_the_run_need_not_be_here(tmp_path: Path, tiny_sd3: Path) -> None:
    elsewhere = [f"run.directory={tmp_path}", f"model.path={tiny_sd3}", "model.device=cuda:7"]
    run = RunDirectory.create(load_config("quickstart", elsewhere))
    here = load_policy(
        run.config().model.model_copy(update={"device": "cpu"}), text_encoders=False, vae=False, base=False
    )
    weights = {name: parameter.detach() for name, parameter in here.trainable().items()}
    write_checkpoint(run.root, 1, {"policy": weights, "ema": weights}, {"epoch": 0}, keep=1)
    assert export_into(run) == run.root / "export"


@pytest.mark.parametrize(
    ("recipe", "method", "tag"),
    [
        (
            "quickstart",
            "with Direct Group Preference Optimization",
            "- direct-group-preference-optimization\n",
        ),
        ("quickstart-flow-grpo", "with Flow-GRPO\n([arXiv 2505.05470]", "- flow-grpo\n"),
        ("quickstart-diffusion-nft", "with DiffusionNFT\n([arXiv 2509.16117]", "- diffusionnft\n"),
    ],
)
def test_the_card_names_the_objective(
    recipe: str, method: str, tag: str, tmp_path: Path, tiny_sd3: Path
) -> None:
    run = RunDirectory.create(load_config(recipe, [f"run.directory={tmp_path}", f"model.path={tiny_sd3}"]))
    checkpoint(run, 1)
    text = card(export_into(run))
    assert method in text
    assert tag in text
    assert f"# {run.name}\n" in text
    assert "'a sign that says" in text


def test_a_later_export_of_the_run_replaces_the_earlier(run: RunDirectory) -> None:
    assert export_into(run) == run.root / "export"
    (run.root / "export" / "pipeline" / "left over").touch()
    checkpoint(run, 5)
    export_into(run)
    assert "| updates | 5 of 36 |\n" in card(run.root / "export")
    assert not (run.root / "export" / "pipeline" / "left over").exists()
    assert [path.name for path in run.root.iterdir() if "export" in path.name] == ["export"]


def test_a_failed_export_leaves_the_earlier(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    export_into(run)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("policy.export.export_policy", full)
    with pytest.raises(OSError, match="no space"):
        export_into(run)
    assert "| updates | 3 of 36 |\n" in card(run.root / "export")


@pytest.mark.parametrize("what", ["file", "filled"])
def test_a_target_of_the_user_s_is_refused(run: RunDirectory, tmp_path: Path, what: str) -> None:
    out = tmp_path / "out"
    if what == "filled":
        out.mkdir()
        (out / "precious").touch()
    else:
        out.touch()
    with pytest.raises(ConfigError, match="--out"):
        export_run(run.root, out, "ema")


def test_scores_are_on_the_card_of_the_weights_they_are_of(run: RunDirectory, tmp_path: Path) -> None:
    evaluation(run, 0, "before", ocr=0.25)
    export_run(run.root, tmp_path / "ema", "ema")
    export_run(run.root, tmp_path / "policy", "policy")
    told = card(tmp_path / "ema")
    assert "| weight | before training | after 3 updates |\n" in told
    assert "| ocr | `ocr` | 1 | 0.250, exact 0.125 ± 0.062 | 0.500, exact 0.250 ± 0.062 |\n" in told
    assert (
        "| tesseract | `ocr_tesseract` | held out, never trained on | 0.250 ± 0.125 | 0.250 ± 0.125 |\n"
        in told
    )
    assert "over 1 held-out prompts" in told
    none = card(tmp_path / "policy")
    assert "| ocr | `ocr` | 1 |\n" in none
    assert (
        "No scores: evaluations inside a run are of its EMA weights; `dgpo eval RUN_DIR --weights pol" in none
    )
    checkpoint(run, 5)
    export_run(run.root, tmp_path / "later", "ema")
    later = card(tmp_path / "later")
    assert "| ocr | `ocr` | 1 |\n" in later
    assert "No scores: the run was not evaluated at update 5" in later


def test_scores_before_of_other_prompts_are_not_beside(run: RunDirectory) -> None:
    evaluation(run, 0, "before", prompts=2)
    assert "| weight | after 3 updates |\n" in card(export_into(run))


def test_the_card_has_what_the_weights_follow_from(tmp_path: Path, tiny_sd3: Path) -> None:
    settings = [
        *(
            f"run.directory={tmp_path}",
            f"model.path={tiny_sd3}",
            "model.train=lora",
            "model.lora={rank: 2, alpha: 8}",
        ),
        *("run.seed=7", "rewards.0.range=[0.1, 0.6]", "rewards.0.weight=3"),
        "objective.clip_range=null",
        'rewards.0.args={"detect": true, "words": "/srv/me/words.txt", "endpoint": "http://10.0.0.7:80"}',
    ]
    run = RunDirectory.create(load_config("quickstart", settings))
    checkpoint(run, 3)
    with Telemetry(run.root, tensorboard=False) as telemetry:
        numbers = {"seconds": 1.0, "reward_mean": 0.5, "reward_std": 0.1, "images": 1536, "groups": 24}
        telemetry.write(UpdateRow(time=time.time(), epoch=0, step=3, max_steps=36, **numbers))
    out = export_into(run)
    for part, what in (("pipeline", ", merged here"), ("lora", "")):
        told = (out / part / "README.md").read_text()
        assert f"| base model | `{tiny_sd3.name}`, a local folder |\n" in told
        # A card is published: it says nothing of how folders are called here.
        assert not any(place in told for place in (str(tiny_sd3.parent), str(tmp_path), "/srv/me"))
        assert f"path: path/to/{tiny_sd3.name}\n" in told
        assert f"LoRA of rank 2 and alpha 8{what}, in the SD3Transformer2DModel: `attn.to_q`, " in told
        assert (
            f"| run | {run.name}, seed 7 |\n| updates | 3 of 36 |\n| images | 1,536 in 24 groups of 16 |"
            in told
        )
        args = '{"detect": true, "words": "path/to/words.txt"}'
        assert f"| ocr | `ocr` `{args}` | 3, 0.1 to 0.6 as 0 to 1 |\n" in told
        recipe = yaml.safe_load(told.split("```yaml")[1].split("```")[0])
        config = run.config()
        assert recipe["objective"] == config.objective.model_dump(mode="json")
        assert recipe["learner"]["learning_rate"] == config.learner.learning_rate
        assert recipe["prompts"] == {"source": "words"}
        # They are a part of a recipe that can be used.
        raw = recipe | {"rewards": [reward.model_dump(mode="json") for reward in config.rewards]}
        assert Config.model_validate(raw).objective == config.objective


def test_one_part_alone(tmp_path: Path, tiny_sd3: Path, run: RunDirectory) -> None:
    settings = [f"run.directory={tmp_path}", f"model.path={tiny_sd3}", "model.train=lora"]
    lora = RunDirectory.create(load_config("quickstart", settings))
    checkpoint(lora, 1)
    for only in ("lora", "pipeline"):
        made = export_run(lora.root, tmp_path / only, "ema", exported_part(only))
        assert made == [tmp_path / only / only]
        assert [path.name for path in (tmp_path / only).iterdir()] == [only]
    # One goes beside the other, which stays as it is; what is there already is never written again.
    for only, other in (("pipeline", "lora"), ("lora", "pipeline")):
        out = tmp_path / other
        files = contents(out / other)
        assert export_run(lora.root, out, "ema", exported_part(only)) == [out / only]
        assert sorted(path.name for path in out.iterdir()) == ["lora", "pipeline"]
        for again in (only, None):
            with pytest.raises(ConfigError, match=f"--out {out}: exists and is not an empty directory"):
                export_run(lora.root, out, "ema", exported_part(again))
        assert contents(out / other) == files
    code = (tmp_path / "lora" / "lora" / "README.md").read_text()
    # It was made without text encoders, which the base model has.
    assert "=None" not in code
    assert '`"lora"` is the folder of this file' in code
    with pytest.raises(ConfigError, match="--only 'vae': pipeline or lora"):
        exported_part("vae")
    with pytest.raises(ConfigError, match="--only lora: the run has trained every weight"):
        export_run(run.root, tmp_path / "full", "ema", "lora")
    assert not (tmp_path / "full").exists()


def test_a_failed_part_leaves_the_other(
    tmp_path: Path, tiny_sd3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [f"run.directory={tmp_path}", f"model.path={tiny_sd3}", "model.train=lora"]
    run, out = RunDirectory.create(load_config("quickstart", settings)), tmp_path / "out"
    checkpoint(run, 1)

    def broken(*args: Any, **kwargs: Any) -> None:
        # While this one was at work, another wrote the other part into the directory that it had made.
        (out / "lora").mkdir(exist_ok=True)
        (out / "lora" / "precious").touch()
        raise OSError(errno.EIO, "no more")

    monkeypatch.setattr("policy.export.export_policy", broken)
    for _ in ("a new directory", "one that has the other part"):
        with pytest.raises(OSError, match="no more"):
            export_run(run.root, out, "ema", "pipeline")
        assert [str(path.relative_to(out)) for path in sorted(out.rglob("*"))] == ["lora", "lora/precious"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("there", [True, False])
def test_a_full_disk_is_told_and_leaves_nothing(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    """The real error of the real writer, after other parts were written."""
    out, own = tmp_path / "out", SD3Transformer2DModel.save_pretrained

    def onto_a_full_disk(self: Any, directory: str, **settings: Any) -> None:
        Path(directory).mkdir()
        (Path(directory) / "config.json").symlink_to("/dev/full")
        own(self, directory, **settings)

    if there:
        out.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(SD3Transformer2DModel, "save_pretrained", onto_a_full_disk)
        with pytest.raises(ExportError, match=f"{out}: not written, .*No space left.*; free space in {out}"):
            export_run(run.root, out, "ema")
    assert out.exists() == there
    assert not there or not any(out.iterdir())
    export_run(run.root, out, "ema")
    assert [path.name for path in out.iterdir()] == ["pipeline"]


def test_a_part_that_has_its_name_goes_with_one_that_cannot_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == "pipeline":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(ExportError, match="nothing left behind"), _written(tmp_path, None) as partial:
        for part in ("lora", "pipeline"):
            (partial / part).mkdir()
    assert not any(tmp_path.iterdir())


def test_two_parts_may_be_written_at_the_same_time(tmp_path: Path) -> None:
    with _written(tmp_path, "lora") as lora, _written(tmp_path, "pipeline") as pipeline:
        for folder in (lora / "lora", pipeline / "pipeline"):
            folder.mkdir()
            (folder / "weights").touch()
    assert sorted(str(one.relative_to(tmp_path)) for one in tmp_path.rglob("weights")) == [
        "lora/weights",
        "pipeline/weights",
    ]
    assert len(list(tmp_path.iterdir())) == 2


def test_what_a_killed_export_left_is_no_obstacle(run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "out" / ".partial" / "pipeline").mkdir(parents=True)
    (tmp_path / "out" / ".partial" / "pipeline" / "half").touch()
    export_run(run.root, tmp_path / "out", "ema")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["pipeline"]
    assert not (tmp_path / "out" / "pipeline" / "half").exists()


def test_the_pipeline_samples_as_evaluations_do(tmp_path: Path, tiny_sd3: Path) -> None:
    settings = [f"run.directory={tmp_path}", f"model.path={tiny_sd3}", "eval.solver=heun"]
    run = RunDirectory.create(load_config("quickstart", settings))
    checkpoint(run, 1)
    scheduler = json.loads(
        (export_into(run) / "pipeline" / "scheduler" / "scheduler_config.json").read_text()
    )
    assert scheduler["_class_name"] == "FlowMatchHeunDiscreteScheduler"
    assert scheduler["shift"] == run.config().rollout.shift
