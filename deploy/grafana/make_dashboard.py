"""The Grafana dashboard of a run: `python deploy/grafana/make_dashboard.py > deploy/grafana/dgpo.json`.

Every panel is one PromQL query of the metrics in services/ray_metrics.py. Ray labels each series with the
process that told it, so all of them are aggregated without that label.
"""

from __future__ import annotations

import json
import sys
from typing import Any, Final

RUN: Final = '{run=~"$run"}'
WIDTH, HEIGHT = 8, 7

PANELS: Final[list[tuple[str, list[tuple[str, str, str, str]]]]] = [
    (
        "Learning",
        [
            ("Total reward", "max by (run) (ray_dgpo_total_reward{R})", "{{run}}", "none"),
            ("Rewards", "max by (run, reward) (ray_dgpo_reward{R})", "{{reward}}", "none"),
            (
                "Scores of a tenth, half, nine tenths",
                "max by (run, reward, quantile) (ray_dgpo_reward_quantile{R})",
                "{{reward}} {{quantile}}",
                "none",
            ),
            ("Held-out evaluation", "max by (run, reward) (ray_dgpo_eval_reward{R})", "{{reward}}", "none"),
            ("Spread within a group", "max by (run, reward) (ray_dgpo_reward_std{R})", "{{reward}}", "none"),
            (
                "Groups that teach nothing",
                "max by (run) (ray_dgpo_zero_variance_groups{R})",
                "{{run}}",
                "none",
            ),
            (
                "Groups that lack a reward",
                "max by (reward) (ray_dgpo_dropped_terms{R})",
                "{{reward}}",
                "none",
            ),
            ("Loss", "max by (run) (ray_dgpo_loss{R})", "{{run}}", "none"),
            ("KL", "max by (run) (ray_dgpo_kl{R})", "{{run}}", "none"),
            ("Gradient norm", "max by (run) (ray_dgpo_grad_norm{R})", "{{run}}", "none"),
        ],
    ),
    (
        "Flow",
        [
            ("Updates", "max by (run) (ray_dgpo_step{R})", "{{run}}", "none"),
            ("Images a second", "max by (run) (deriv(ray_dgpo_images{R}[5m]))", "{{run}}", "none"),
            ("Update", "max by (run, phase) (ray_dgpo_learner_seconds{R})", "{{phase}}", "s"),
            ("Rollout of a group", "max by (run, phase) (ray_dgpo_rollout_seconds{R})", "{{phase}}", "s"),
            (
                "Groups an hour, at most so stale",
                "sum by (run, le) (increase(ray_dgpo_staleness_bucket{R}[1h]))",
                "{{le}}",
                "none",
            ),
            ("Staleness, most", "max by (run) (ray_dgpo_staleness_max{R})", "{{run}}", "none"),
            ("Groups waiting", "max by (run) (ray_dgpo_queue_depth{R})", "{{run}}", "none"),
            ("Their payload", "max by (run) (ray_dgpo_queue_bytes{R})", "{{run}}", "bytes"),
        ],
    ),
    (
        "Parts",
        [
            ("Heartbeats", "max by (run, part) (ray_dgpo_part_up{R})", "{{part}}", "none"),
            ("Version lag", "max by (run, part) (ray_dgpo_part_version_lag{R})", "{{part}}", "none"),
            (
                "Install of weights",
                "max by (run, part) (ray_dgpo_part_install_seconds{R})",
                "{{part}}",
                "s",
            ),
            ("In its state for", "max by (run, part) (ray_dgpo_part_state_seconds{R})", "{{part}}", "s"),
            ("Memory, peak", "max by (run, part) (ray_dgpo_part_memory_bytes{R})", "{{part}}", "bytes"),
            ("Events", "sum by (run, event) (ray_dgpo_events_total{R})", "{{event}}", "none"),
        ],
    ),
    (
        "Reward servers",
        [
            (
                "Requests a second",
                "sum by (reward) (rate(ray_dgpo_reward_request_seconds_count{R}[1m]))",
                "{{reward}}",
                "reqps",
            ),
            (
                "Time of a request, 95 %",
                "histogram_quantile(0.95, sum by (reward, le) "
                "(rate(ray_dgpo_reward_request_seconds_bucket{R}[1m])))",
                "{{reward}}",
                "s",
            ),
            (
                "Failures",
                "sum by (reward, error) (ray_dgpo_reward_errors_total{R}) or sum by (reward) "
                "(0 * ray_dgpo_reward_request_seconds_count{R})",
                "{{reward}} {{error}}",
                "none",
            ),
        ],
    ),
]
"""Row -> (title, query, legend, unit); {R} is the choice of the run."""


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for row, of_row in PANELS:
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": row,
                "collapsed": False,
                "panels": [],
                "gridPos": {"x": 0, "y": y, "w": 24, "h": 1},
            }
        )
        y += 1
        for place, (title, query, legend, unit) in enumerate(of_row):
            x, down = place % 3 * WIDTH, place // 3 * HEIGHT
            panels.append(
                _panel(len(panels) + 1, title, query.replace("{R}", RUN), legend, unit, x, y + down)
            )
        y += -(-len(of_row) // 3) * HEIGHT
    return {
        "uid": "dgpo-run",
        "title": "DGPO run",
        "tags": ["dgpo", "ray"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [_source(), _runs()]},
        "panels": panels,
    }


def _panel(number: int, title: str, query: str, legend: str, unit: str, x: int, y: int) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "id": number,
        "type": "timeseries",
        "title": title,
        "datasource": source,
        "gridPos": {"x": x, "y": y, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit, "custom": {"lineWidth": 2}}, "overrides": []},
        "options": {"legend": {"showLegend": True, "displayMode": "list", "placement": "bottom"}},
        "targets": [{"refId": "A", "datasource": source, "expr": query, "legendFormat": legend}],
    }


def _source() -> dict[str, Any]:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _runs() -> dict[str, Any]:
    return {
        "name": "run",
        "label": "Run",
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": {"query": "label_values(ray_dgpo_step, run)", "refId": "run"},
        "refresh": 2,
        "sort": 2,
        "multi": True,
        "includeAll": True,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(dashboard(), indent=1) + "\n")
