"""Grafana dashboard and alerts ask for metrics that there are. With a real Prometheus: tests/integration."""

from __future__ import annotations

import json
import re
import runpy
from typing import Any

import pytest
import yaml

from services.config_file import PROJECT_ROOT
from services.queue_types import RunState
from services.ray_metrics import METRICS

DEPLOY = PROJECT_ROOT / "deploy"
ALERTS = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"][0]["rules"]
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "dgpo.json").read_text())
QUERIES = {
    panel["title"]: panel["targets"][0]["expr"] for panel in DASHBOARD["panels"] if panel["type"] != "row"
}


def labels_of(metric: str) -> set[str]:
    """Of a metric as Prometheus names it: a counter ends in _total, a histogram has buckets and a count."""
    name = metric.removeprefix("ray_")
    for ending in ("", "_total", "_bucket", "_count", "_sum"):
        if name.removesuffix(ending) in METRICS:
            found = {"run", *METRICS[name.removesuffix(ending)].labels}
            return found | {"le"} if ending == "_bucket" else found
    raise AssertionError(f"nobody tells {metric}")


@pytest.mark.parametrize("query", [*QUERIES.values(), *(rule["expr"] for rule in ALERTS)])
def test_a_query_asks_for_metrics_and_labels_that_there_are(query: str) -> None:
    metrics = set(re.findall(r"ray_dgpo_\w+", query))
    assert metrics
    known = set().union(*map(labels_of, metrics))
    for listed in re.findall(r"(?:by|on) \(([^)]*)\)", query):
        assert {label.strip() for label in listed.split(",")} <= known
    for selected in re.findall(r"\{(\w+)=", query):
        assert selected in known


def test_every_metric_is_shown_or_is_behind_an_alert() -> None:
    asked = " ".join([*QUERIES.values(), *(rule["expr"] for rule in ALERTS)])
    beside = {  # further numbers of what is shown
        *("dgpo_max_steps", "dgpo_update_seconds", "dgpo_groups", "dgpo_groups_per_second", "dgpo_dsm"),
        *("dgpo_staleness_mean", "dgpo_group_weight", "dgpo_clip_fraction", "dgpo_learning_rate"),
        "dgpo_part_groups",
    }
    assert {name for name in METRICS if f"ray_{name}" not in asked} == beside


def test_alerts_name_states_and_events_of_ours() -> None:
    for rule in ALERTS:
        for state in re.findall(r'state="(\w+)"', rule["expr"]):
            assert state in RunState.__args__
        for event in re.findall(r'event="([^"]+)"', rule["expr"]):
            assert event in (PROJECT_ROOT / "services" / "monitor.py").read_text()
        assert rule["annotations"].keys() == {"summary", "remedy"}


def test_the_dashboard_is_what_its_script_makes() -> None:
    made = runpy.run_path(str(DEPLOY / "grafana" / "make_dashboard.py"))["dashboard"]()
    assert made == DASHBOARD, "python deploy/grafana/make_dashboard.py > deploy/grafana/dgpo.json"
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)
