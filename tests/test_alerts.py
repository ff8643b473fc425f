"""The alert rules, by promtool: tests/alerts/alerts.yml has each of them not firing, firing, and cleared."""
from __future__ import annotations

import shutil
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
RULES = REPOSITORY / "configs" / "alerts.yml"
CASES = REPOSITORY / "tests" / "alerts" / "alerts.yml"
ASKED_FOR = {"HighTaskFailureRate", "DeadLetterQueueGrowth", "QueueBacklog", "WorkerDown", "NoLeader", "StuckTasks", "NoRecovery",
             "OldestTaskTooOld", "DatabaseUnreachable"}

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")


def promtool(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *args], check=False, capture_output=True, text=True, timeout=30)


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


@needs_promtool
def test_promtool_accepts_the_configuration_and_its_rules() -> None:
    checked = promtool("check", "config", REPOSITORY / "configs" / "prometheus.yml")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(rules())} rules found" in checked.stdout


@needs_promtool
def test_each_alert_fires_and_clears() -> None:
    tested = promtool("test", "rules", CASES)
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_the_cases_see_each_alert_quiet_firing_and_quiet_again() -> None:
    seen: dict[str, set[str]] = defaultdict(set)
    for case in yaml.safe_load(CASES.read_text())["tests"]:
        story: dict[str, str] = defaultdict(str)
        for check in case["promql_expr_test"]:
            story[check["expr"].split('"')[1]] += "firing " if check["exp_samples"] else "quiet "
        for alert, course in story.items():
            seen[alert].add(course.strip())
    assert {rule["alert"] for rule in rules()} == set(seen) >= ASKED_FOR
    for alert, courses in seen.items():
        assert "quiet firing quiet" in courses, alert


@needs_promtool
def test_an_alert_that_never_fires_or_never_clears_is_found(tmp_path: Path) -> None:
    """So the cases can fail: with every rule made deaf, then made constant, promtool complains about each."""
    cases = yaml.safe_load(CASES.read_text()) | {"rule_files": ["alerts.yml"]}
    (tmp_path / "cases.yml").write_text(yaml.safe_dump(cases))
    for broken in ("vector(1) > 1", "vector(1)"):
        group = yaml.safe_load(RULES.read_text())
        for rule in group["groups"][0]["rules"]:
            rule["expr"] = broken
        (tmp_path / "alerts.yml").write_text(yaml.safe_dump(group))
        complaints = promtool("test", "rules", tmp_path / "cases.yml").stderr
        assert [rule["alert"] for rule in rules() if f'alertname=\\"{rule["alert"]}\\"' not in complaints] == []


def test_each_alert_says_how_severe_it_is_and_what_to_do() -> None:
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert 10 < len(rule["annotations"]["summary"]) < 120
        assert len(rule["annotations"]["description"]) > 100
