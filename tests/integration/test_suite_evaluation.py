"""`dgpo eval --suite` and `dgpo compare` with the quickstart's model on real Ray and a real reward server."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from policy import load_policy
from policy.export import export_lora
from reward_servers.app import create_app
from reward_servers.local import LocalServer
from reward_servers.server_config import ServerConfig
from rollout_workers.suite_worker import SuiteWorker
from services.checkpoint_parts import sha256_of
from services.cli import app
from services.config_file import PROJECT_ROOT, ConfigError, load_config

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_local"), pytest.mark.timeout(300)]

TOKEN_VARIABLE = "DGPO_TEST_REWARD_TOKEN"
MODEL = str(PROJECT_ROOT / "quickstart" / "model")
PROMPTS = 18
"""Two shards."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A recipe whose reward is served, and a file of prompts with tags."""
    folder = tmp_path_factory.mktemp("suite")
    rows = [
        {"prompt": f'a sign that says "{word}"', "tag": ("letters", "digits")[number % 2]}
        for number, word in enumerate(f"A{number:03}"[-4:] for number in range(PROMPTS))
    ]
    (folder / "signs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with LocalServer(create_app(ServerConfig(app="ocr", token_env=TOKEN_VARIABLE))) as server:
        reward = f"{{name: ocr, url: '{server.url}', token_env: {TOKEN_VARIABLE}}}"
        (folder / "recipe.yaml").write_text(
            f"extends: quickstart\nrollout: {{steps: 4, num_cpus: 0.5}}\nrewards: [{reward}]\n"
        )
        yield folder


def dgpo(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


def evaluation(place: Path, out: str, *options: str) -> dict[str, Any]:
    done = dgpo(
        *("eval", MODEL, "--recipe", str(place / "recipe.yaml"), "--suite", str(place / "signs.jsonl")),
        *("--out", str(place / out), "--samples", "2", "--json", *options),
    )
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def shards(place: Path, out: str) -> list[str]:
    return [file.read_text() for file in sorted((place / out / "shards").iterdir())]


@pytest.fixture(scope="module")
def first(place: Path) -> dict[str, Any]:
    return evaluation(place, "first", "--workers", "2", "--images")


def test_a_suite_is_evaluated_into_a_folder(place: Path, first: dict[str, Any]) -> None:
    assert (first["prompts"], first["images"], first["shards_sampled"]) == (PROMPTS, 2 * PROMPTS, 2)
    assert 0 < first["rewards"]["ocr"]["mean"] < 1
    assert first["rewards"]["ocr"]["se"] > 0
    assert {tag: found["prompts"] for tag, found in first["tags"].items()} == {"letters": 9, "digits": 9}
    by_tag = [found["rewards"]["ocr"]["mean"] for found in first["tags"].values()]
    assert first["tag_mean"]["rewards"]["ocr"]["mean"] == pytest.approx(sum(by_tag) / 2)
    assert json.loads((place / "first" / "summary.json").read_text())["rewards"] == first["rewards"]
    for number in range(2):
        with Image.open(place / "first" / "sheets" / f"{number:05}.png") as sheet:
            assert sheet.format == "PNG"
    assert len(list((place / "first" / "images").glob("*.png"))) == 2 * PROMPTS


class Mortal(SuiteWorker):
    """Dies in the first shard that it is given."""

    def make(self, task: str) -> Any:
        marker = self._config.run.directory / "has died"
        if not marker.exists():
            marker.touch()
            os._exit(1)
        return super().make(task)


@pytest.mark.usefixtures("first")
def test_only_what_is_missing_is_sampled_again_by_however_many_workers_and_deaths(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = shards(place, "first")
    (place / "first" / "shards" / "00001.json").unlink()
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr("services.suites.run.SuiteWorker", Mortal)
    again = evaluation(place, "first", "--workers", "1", "--set", f"run.directory={place}")
    assert (place / "has died").exists()
    assert again["shards_sampled"] == 1
    assert shards(place, "first") == before
    assert evaluation(place, "first")["shards_sampled"] == 0


@pytest.mark.usefixtures("first")
def test_a_changed_configuration_is_refused_and_nothing_is_touched(place: Path) -> None:
    before = shards(place, "first")
    with pytest.raises(ConfigError) as error:
        evaluation(place, "first", "--set", "eval.seed=7", "--set", "rollout.guidance=4.5",
                   "--set", "objective.cfg_free=false")  # fmt: skip
    assert "seed: 7; there 99" in str(error.value)
    assert "sampling.guidance: 4.5; there 1.0" in str(error.value)
    assert shards(place, "first") == before


@pytest.mark.usefixtures("first")
def test_two_evaluations_are_compared_image_by_image(place: Path) -> None:
    evaluation(place, "second", "--workers", "1", "--set", "eval.solver=euler")
    done = dgpo("compare", str(place / "first"), str(place / "second"), "--json", "--resamples", "500")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert (found["prompts"], found["images"]) == (PROMPTS, 2 * PROMPTS)
    assert set(found["measures"]) == {"ocr", "ocr.exact"}
    assert found["measures"]["ocr"]["low"] <= found["measures"]["ocr"]["difference"]
    assert set(found["tags"]) == {"letters", "digits"}
    assert any(
        line.startswith("sampling.solver: 'dpmsolver++'; there 'euler'") for line in found["otherwise"]
    )
    same = dgpo("compare", str(place / "first"), str(place / "first"), "--json", "--resamples", "500")
    nothing = json.loads(same.stdout.strip().splitlines()[-1])["measures"]["ocr"]
    assert (nothing["difference"], nothing["low"], nothing["high"], nothing["better"]) == (0, 0, 0, 0)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of adapters with which the model cannot spell any more."""
    config = load_config("quickstart", ["model.train=lora", "model.lora.rank=2"])
    policy = load_policy(config.model, text_encoders=False, vae=False)
    policy.install({name: torch.full_like(tensor, 0.2) for name, tensor in policy.tensors().items()})
    return export_lora(policy, tmp_path_factory.mktemp("export") / "lora", rollout=config.rollout)


def test_held_out_prompts_have_the_seeds_of_an_evaluation_inside_a_run(
    place: Path, lora: Path, first: dict[str, Any]
) -> None:
    """An exported LoRA is installed in this process as in workers."""
    done = dgpo(
        *("eval", "--checkpoint", str(lora), "--recipe", str(place / "recipe.yaml"), "--suite", "heldout"),
        *("--limit", "6", "--workers", "1", "--out", str(place / "heldout"), "--json"),
    )
    assert done.exit_code == 0, done.output
    suite = json.loads(done.stdout.strip().splitlines()[-1])
    plain = dgpo(
        *("eval", str(lora), "--recipe", str(place / "recipe.yaml"), "--set", "eval.final_prompts=6"),
        "--json",
    )
    within = json.loads(plain.stdout.strip().splitlines()[-1])
    assert suite["rewards"]["ocr"]["mean"] == pytest.approx(within["rewards"]["ocr"]["mean"], abs=1e-6)
    assert (within["model"], within["weights"]) == (str(lora), "lora")
    assert suite["rewards"]["ocr"]["mean"] < 0.1 < first["rewards"]["ocr"]["mean"]
    settings = json.loads((place / "heldout" / "evaluation.json").read_text())
    assert settings["kind"] == "lora"
    assert settings["weights"] == sha256_of(lora / "pytorch_lora_weights.safetensors")
    assert suite["rewards"]["ocr"]["se"] == pytest.approx(within["rewards"]["ocr"]["se"], abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["eval"], "MODEL, or --checkpoint"),
        (["eval", MODEL, "--samples", "2"], "add --suite"),
        (["eval", MODEL, "--suite", "ocr"], "say --recipe"),
        (["eval", MODEL, "--recipe", "quickstart", "--revision", "main"], "for a model of the hub"),
        (["eval", MODEL, "--recipe", "quickstart", "--other-base"], "for an exported LoRA"),
        (["eval", MODEL, "--recipe", "quickstart", "--suite", "ocr", "--other-base"], "for an exported LoRA"),
        (["eval", MODEL, "--recipe", "quickstart", "--suite", "drawbench"], "is not shipped"),
        (["eval", MODEL, "--recipe", "quickstart", "--suite", "ocr", "--rewards", "nothing"], "no reward of"),
        (["compare", MODEL, MODEL], "no evaluation of a suite"),
    ],
)
def test_wrong_usage_is_named(arguments: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        dgpo(*arguments)
