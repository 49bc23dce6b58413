"""The metrics reference: generated, complete, and committed as it is generated."""

from __future__ import annotations

from pydantic import BaseModel

from services.config_file import PROJECT_ROOT
from services.metrics_docs import PARTS, ROWS, main, reference
from services.ray_metrics import METRICS


def test_the_committed_page_is_up_to_date() -> None:
    committed = (PROJECT_ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert committed == reference(), "the metrics have changed: run `make docs` and commit the page"


def test_every_field_says_what_it_means() -> None:
    page = reference()
    models: tuple[type[BaseModel], ...] = (*ROWS, *PARTS)
    for model in models:
        for name, field in model.model_fields.items():
            assert name == "kind" or (field.description and f"| `{name}` |" in page), (
                f"{model.__name__}.{name}"
            )


def test_every_metric_is_there() -> None:
    page = reference()
    assert [name for name in METRICS if f"| `{name}` |" not in page] == []


def test_a_tensorboard_name_leads_to_its_field() -> None:
    page = reference()
    assert "| `train/loss` | `loss` | `update` |" in page
    assert "| `reward/REWARD_std` | `rewards.REWARD.std` | `update` |" in page
    assert "| `time/rollout_PHASE` | `rollout.PHASE` | `update` |" in page
    assert "| `eval/REWARD_exact` | `exact.REWARD.mean` | `eval` |" in page


def test_the_command_needs_a_file() -> None:
    assert main([]) == 2
