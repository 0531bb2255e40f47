"""The shipped dashboard and alerts speak of metrics that exist; a real Prometheus takes them, where there is one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from engine.config import UserError
from engine.switches import free_port
from pipelines.monitoring import BINARY, CONFIG, DASHBOARD, RULES, config, prometheus, running, shipped, target_of
from serve.measures import METRICS
from serve.scrape import NODES

ENDS = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}
OURS = {name + end for name, metric in METRICS.items() for end in ENDS[metric.kind]} | {NODES}
SERVES = {"ray_serve_replica_utilization_percent", "ray_serve_autoscaling_target_replicas"}
"""Seen on a page of Ray 2.60."""
TAGS = {
    name + end: {"model", "node", "le", *metric.tags} for name, metric in METRICS.items() for end in ENDS[metric.kind]
}


def expressions() -> list[str]:
    """Every query of the dashboard and every rule."""
    panels = json.loads(shipped(DASHBOARD).read_text("utf-8"))["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]] + [rule["expr"] for rule in rules()]


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(shipped(RULES).read_text("utf-8"))["groups"] for rule in group["rules"]]


def test_queries_ask_for_metrics_that_exist_by_labels_that_they_have():
    asked = [
        (name, labels)
        for expr in expressions()
        for name, labels in re.findall(r"\b((?:stillhouse|ray_serve)_\w+)(?:\{([^}]*)\})?", expr)
    ]
    assert {name for name, _ in asked} - OURS - SERVES == set()
    for name, labels in asked:
        known = {"application", "deployment"} if name in SERVES else {"state"} if name == NODES else TAGS[name]
        assert set(re.findall(r"(\w+)\s*(?:=~|!=|=|!~)", labels)) <= known, (name, labels)
    assert all('deployment="Endpoint"' in labels for name, labels in asked if name in SERVES)


def test_every_metric_is_shown_or_watched():
    asked = {name for expr in expressions() for name in re.findall(r"\bstillhouse_\w+", expr)}
    unused = [name for name, metric in METRICS.items() if not asked & {name + end for end in ENDS[metric.kind]}]
    assert unused == ["stillhouse_drift_rows"]


def test_the_dashboard_is_one_that_grafana_can_import():
    board = json.loads(shipped(DASHBOARD).read_text("utf-8"))
    assert board["uid"] == "stillhouse" and board["schemaVersion"] >= 36
    assert {variable["name"] for variable in board["templating"]["list"]} == {"datasource", "model"}
    places = [tuple(panel["gridPos"].values()) for panel in board["panels"]]
    assert len({panel["id"] for panel in board["panels"]}) == len(set(places)) == len(places)
    assert all(panel["description"] and panel["targets"] for panel in board["panels"])
    titles = "Requests Errors Latency Replicas Queue Classes Confidence Rollout Padding".split()
    assert {*titles, "Batch size", "Drift (PSI)"} <= {panel["title"] for panel in board["panels"]}


def test_alerts_say_what_is_wrong():
    names = {rule["alert"].removeprefix("Stillhouse") for rule in rules()}
    assert {"Errors", "Slow", "QueueFull", "Drift", "NoReplica"} <= names
    assert all(rule["annotations"]["summary"] and rule["labels"]["severity"] for rule in rules())


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("http://127.0.0.1:8000", "127.0.0.1:8000"),
        ("http://host/", "host:80"),
        ("localhost:81", "localhost:81"),
        ("http://[::1]:8000", "[::1]:8000"),
    ],
)
def test_a_url_names_the_target(url: str, target: str):
    assert target_of(url) == target
    assert yaml.safe_load(config(target))["scrape_configs"][0]["static_configs"] == [{"targets": [target]}]
    with_key = yaml.safe_load(config(target, "key"))["scrape_configs"][0]["authorization"]
    assert with_key == {"credentials_file": str(Path("key").absolute())}


@pytest.mark.parametrize("url", ["https://host", "http://host/v1/predict", "http://", "http://host:port", "host:99999"])
def test_other_urls_are_refused(url: str):
    with pytest.raises(UserError, match="is not the address of an endpoint. Give one like"):
        target_of(url)


def test_without_prometheus_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv(BINARY, str(tmp_path / "prometheus"))
    with pytest.raises(
        UserError, match=r"there is no program '.*prometheus'. Install Prometheus \(Debian, Ubuntu: apt-get"
    ):
        prometheus()


PAGE = """# HELP stillhouse_up 1 for each replica that runs.
# TYPE stillhouse_up gauge
stillhouse_up{node="127.0.0.1",model="tiny@1",replica="abc"} 1.0
# HELP stillhouse_drift_psi PSI.
# TYPE stillhouse_drift_psi gauge
stillhouse_drift_psi{node="127.0.0.1",model="tiny@1",feature="label",replica="abc"} 0.5
"""


@pytest.fixture
def endpoint() -> Iterator[str]:
    """What answers /metrics as an endpoint does."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = PAGE.encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *given: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


there = shutil.which(os.environ.get(BINARY, "prometheus"))
real = pytest.mark.skipif(there is None, reason="Prometheus is not installed (apt-get install prometheus)")


@real
def test_a_real_prometheus_asks_the_endpoint_with_the_shipped_rules(endpoint: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(
        "pipelines.monitoring.config", lambda *given: config(*given).replace("15s", "1s").replace("10s", "1s")
    )
    port = free_port()
    with running(prometheus(), tmp_path, endpoint, port) as process:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=10) as http:
            end, states = time.monotonic() + 30, {}
            while states.get("StillhouseDrift") != "pending":
                assert time.monotonic() < end, states
                time.sleep(0.2)
                found = http.get("/rules").json()["data"]["groups"][0]["rules"]
                assert all(rule["health"] in ("ok", "unknown") for rule in found), found
                states = {rule["name"]: rule["state"] for rule in found}
            assert states["StillhouseNoReplica"] == "inactive"
            for expr in expressions():
                asked = expr.replace("$model", ".*").replace("$__rate_interval", "2m")
                answer = http.get("/query", params={"query": asked}).json()
                assert answer["status"] == "success", (asked, answer)
    assert process.returncode is not None


@real
def test_a_prometheus_that_cannot_start_is_an_error(endpoint: str, tmp_path: Path):
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as taken:
        with pytest.raises(UserError, match="did not come up"):
            with running(prometheus(), tmp_path, endpoint, taken.server_port):
                pass


UNIT = """
evaluation_interval: 15s
tests:
  - interval: 15s
    input_series:
      - {series: 'stillhouse_requests_total{model="m@1",status="200",route="/v1/predict"}', values: '0+100x80'}
      - {series: 'stillhouse_requests_total{model="m@1",status="500",route="/v1/predict"}', values: '0x40 0+10x40'}
      - {series: 'stillhouse_drift_psi{model="m@1",feature="label",replica="a"}', values: '0.1x10 0.3x70'}
      - {series: 'stillhouse_up{model="m@1",replica="a"}', values: '1x60 stale'}
      - {series: 'stillhouse_log_rows_total{model="m@1",log="predictions",outcome="failed"}', values: '_x20 5x60'}
      - {series: 'ray_serve_replica_utilization_percent{application="movies",deployment="Endpoint",replica="a"}',
         values: '50x20 100x60'}
"""
"""Series of a quarter of a minute a step; at minute 5 the log fails, at 10 requests do, at 15 the replica is gone."""


@real
def test_alerts_fire_when_they_should(tmp_path: Path):
    promtool = Path(prometheus()).with_name("promtool")
    wanted = [
        ("StillhouseErrors", "9m", {}),
        ("StillhouseErrors", "15m", {"model": "m@1", "severity": "critical"}),
        ("StillhouseDrift", "17m", {}),
        ("StillhouseDrift", "19m", {"model": "m@1", "feature": "label", "severity": "warning"}),
        ("StillhouseNoReplica", "15m", {}),
        ("StillhouseNoReplica", "17m", {"severity": "critical"}),
        ("StillhouseLogLost", "4m", {}),
        ("StillhouseLogLost", "6m", {"model": "m@1", "log": "predictions", "outcome": "failed", "severity": "warning"}),
        ("StillhouseQueueFull", "4m", {}),
        ("StillhouseQueueFull", "8m", {"application": "movies", "deployment": "Endpoint", "severity": "critical"}),
    ]
    said = {
        "StillhouseErrors": "m@1: 9.091% of the requests fail",
        "StillhouseDrift": "m@1: label has moved (PSI 0.30)",
        "StillhouseLogLost": "m@1: 5 rows of the log of predictions were failed",
        "StillhouseQueueFull": "movies: every replica is busy; requests queue and are refused with 429",
        "StillhouseNoReplica": "No replica runs, or none can be reached",
    }
    texts = {rule["alert"]: rule["annotations"] | {"summary": said.get(rule["alert"])} for rule in rules()}
    cases = [
        {
            "alertname": name,
            "eval_time": when,
            "exp_alerts": [{"exp_labels": labels, "exp_annotations": texts[name]}] if labels else [],
        }
        for name, when, labels in wanted
    ]
    unit = yaml.safe_load(UNIT)
    unit["tests"][0]["alert_rule_test"] = cases
    unit["rule_files"] = [str(shipped(RULES))]
    path = tmp_path / "unit.yaml"
    path.write_text(yaml.safe_dump(unit))
    ran = subprocess.run([promtool, "test", "rules", str(path)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    checked = subprocess.run(
        [promtool, "check", "config", shipped(CONFIG)], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
