"""Alerts and dashboards speak of numbers that a training job or an endpoint exports, and of nothing else."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from farspan.serve.metrics import Metrics
from farspan.telemetry.names import METRICS

FOLDER = Path(__file__).resolve().parents[2] / "infra" / "monitoring"
DASHBOARDS = sorted((FOLDER / "dashboards").glob("*.json"))
# Ray puts its name before every metric of an application. What requests are measured by stands on the endpoint's own
# /metrics, behind a key: the PodMonitor does not read it, so no alert may speak of it, and only one dashboard does.
EXPORTED = {f"ray_{m.name}" for m in METRICS if not m.source.startswith("request_served.")}
SERVED = "serving.json"
_NOTHING_CHANGED = r"changes\((\w+)\[(\w+)\]\) == 0"
# What Prometheus names the samples of a number of that kind.
SAMPLES = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_count", "_sum"]}
SERVING = {f"{name}{end}" for name, kind, _ in Metrics().names() for end in SAMPLES[kind]}


def names(text: str) -> set[str]:
    return set(re.findall(r"\b(?:ray|farspan)_\w+", text))


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((FOLDER / "alerts.yaml").read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.name)
def test_a_dashboard_shows_only_numbers_that_exist(file: Path) -> None:
    dashboard = json.loads(file.read_text(encoding="utf-8"))
    targets = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(targets) >= 9
    assert all(names(expression) for expression in targets)
    assert names(file.read_text(encoding="utf-8")) - (SERVING if file.name == SERVED else EXPORTED) == set()


def test_the_dashboard_of_an_endpoint_shows_every_number_it_counts() -> None:
    shown = names((FOLDER / "dashboards" / SERVED).read_text(encoding="utf-8"))
    counted = {name: {f"{name}{end}" for end in SAMPLES[kind]} for name, kind, _ in Metrics().names()}
    assert [name for name, samples in counted.items() if not samples & shown] == []


def test_dashboards_have_names_of_their_own_and_places_that_do_not_overlap() -> None:
    loaded = [json.loads(file.read_text(encoding="utf-8")) for file in DASHBOARDS]
    assert len({dashboard["uid"] for dashboard in loaded}) == len(loaded) == 3
    for dashboard in loaded:
        places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
        assert len(set(places)) == len(places)


def test_every_alert_speaks_of_numbers_that_exist_and_says_what_to_do() -> None:
    for rule in rules():
        assert names(rule["expr"]), rule["alert"]
        assert names(rule["expr"]) - EXPORTED == set(), rule["alert"]
        assert set(rule["annotations"]) == {"summary", "action"}, rule["alert"]
        assert rule["labels"]["severity"] in ("page", "warn"), rule["alert"]


def test_an_alert_about_what_did_not_happen_asks_whether_the_run_is_that_old_and_still_there() -> None:
    asked = [(rule["expr"], *found) for rule in rules() for found in re.findall(_NOTHING_CHANGED, rule["expr"])]
    assert len(asked) == 2
    for expression, number, window in asked:
        assert f"present_over_time({number}[15m] offset {window})" in expression
        # The number itself: a run that ended has none.
        assert re.search(rf"\b{number}\b(?!\[)", expression)


def test_every_alert_is_tried_out_both_ways() -> None:
    tried = yaml.safe_load((FOLDER / "alerts_test.yaml").read_text(encoding="utf-8"))["tests"]
    cases = [case for test in tried for case in test["alert_rule_test"]]
    alerts = {rule["alert"] for rule in rules()}
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == alerts
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == alerts


def test_the_alerts_fire_when_they_should() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (package prometheus): the alerts are not tried out")
    for command in (["check", "rules", "alerts.yaml"], ["test", "rules", "alerts_test.yaml"]):
        answer = subprocess.run(
            [promtool, *command], cwd=FOLDER, capture_output=True, text=True, timeout=120, check=False
        )
        assert answer.returncode == 0, answer.stdout + answer.stderr
