"""A real Prometheus scrapes a run on a real Ray cluster: every panel and every alert gets an answer."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from test_cli import settings
from test_ray_job import Cluster, cluster

from services.config_file import PROJECT_ROOT
from tests.ports import free_ports

__all__ = ["cluster"]

pytestmark = [
    *(pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(420)),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed"),
]


@pytest.fixture(scope="module")
def prometheus(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder, port = tmp_path_factory.mktemp("prometheus"), free_ports(1)[0]
    listed = Path("/tmp/ray/prom_metrics_service_discovery.json")
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "2s"},
        "rule_files": [str(PROJECT_ROOT / "deploy" / "prometheus" / "alerts.yml")],
        "scrape_configs": [{"job_name": "ray", "file_sd_configs": [{"files": [str(listed)]}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                *("prometheus", f"--config.file={folder / 'prometheus.yml'}"),
                *(f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}"),
            ],
            stdout=log,
            stderr=log,
        )
    yield f"http://127.0.0.1:{port}/api/v1"
    process.send_signal(signal.SIGTERM)
    process.wait(30)


def ask(prometheus: str, path: str, **parameters: str) -> Any:
    answer = httpx.get(f"{prometheus}/{path}", params=parameters, trust_env=False, timeout=30)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


def test_every_panel_and_every_alert_has_data(cluster: Cluster, prometheus: str, tmp_path: Path) -> None:
    panels = json.loads((PROJECT_ROOT / "deploy" / "grafana" / "dgpo.json").read_text())["panels"]
    queries = {p["title"]: p["targets"][0]["expr"] for p in panels if p["type"] != "row"}
    arguments = settings(tmp_path, "learner.max_steps=12", "rewards.1.every=1", "eval.every_steps=4")
    environment = {**cluster.environment, "RAY_ADDRESS": f"127.0.0.1:{cluster.port}"}
    run = subprocess.Popen(
        [sys.executable, "-m", "services.cli", "train", "quickstart", *arguments],
        env=environment,
        cwd=PROJECT_ROOT,
    )
    empty = set(queries) - {"Events"}  # nothing happens to this run
    while run.poll() is None:
        for title in sorted(empty):
            if ask(prometheus, "query", query=queries[title].replace("$run", ".*"))["result"]:
                empty.discard(title)
        time.sleep(0.5)
    assert run.returncode == 0
    assert not empty, f"no data in {sorted(empty)}"
    rules = ask(prometheus, "rules")["groups"][0]["rules"]
    assert {rule["name"]: rule["health"] for rule in rules} == {rule["name"]: "ok" for rule in rules}
    fired = ask(prometheus, "query", query='ALERTS{alertname=~"Dgpo.*", alertstate="firing"}')["result"]
    assert [alert["metric"]["alertname"] for alert in fired] == []
    series = ask(prometheus, "series", **{"match[]": '{__name__=~"ray_dgpo_.*"}'})
    assert len(series) < 400, "labels do not grow with the length of a run"


def test_alerts_fire_from_the_first_event_on(tmp_path: Path) -> None:
    (tmp_path / "alerts.yml").symlink_to(PROJECT_ROOT / "deploy" / "prometheus" / "alerts.yml")
    (tmp_path / "test.yml").write_text(yaml.safe_dump(FIRING))
    tested = subprocess.run(
        ["promtool", "test", "rules", "test.yml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert tested.returncode == 0, tested.stdout + tested.stderr


def _fires(name: str, after: str, severity: str, summary: str, remedy: str, **labels: str) -> dict[str, Any]:
    told = {
        "exp_labels": {"severity": severity, "run": "a", **labels},
        "exp_annotations": {"summary": summary, "remedy": remedy},
    }
    return {"eval_time": after, "alertname": name, "exp_alerts": [told]}


FIRING = {
    "rule_files": ["alerts.yml"],
    "evaluation_interval": "1m",
    "tests": [
        {
            "interval": "1m",
            "input_series": [
                # Counters are not there at 0 before something happens.
                {"series": 'ray_dgpo_events_total{run="a",event="guard fired"}', "values": "_x5 1x10"},
                {
                    "series": 'ray_dgpo_reward_errors_total{run="a",reward="ocr",error="E"}',
                    "values": "_x5 5x9",
                },
                {"series": 'ray_dgpo_updated_timestamp_seconds{run="a"}', "values": "0x60"},
                {"series": 'ray_dgpo_state{run="a",state="running"}', "values": "1x60"},
            ],
            "alert_rule_test": [
                _fires(
                    *("DgpoGuard", "8m", "ticket"),
                    "a held-out reward of a falls while the trained one rises",
                    "look at the images: dgpo report RUN_DIR",
                ),
                _fires(
                    *("DgpoRewardFails", "8m", "page"),
                    "ocr failed 5 requests of a in 10 minutes",
                    "the server's log; serve status",
                    reward="ocr",
                ),
                {"eval_time": "20m", "alertname": "DgpoNoUpdate", "exp_alerts": []},
                _fires(
                    *("DgpoNoUpdate", "40m", "page"),
                    "a has made no update for 40m 0s",
                    "dgpo status RUN_DIR names what each part waits for",
                ),
            ],
        }
    ],
}
"""What promtool is given: series, and the alerts that they must raise."""
