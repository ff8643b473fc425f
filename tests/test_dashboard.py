"""The dashboard and the alerts against a real Prometheus that scrapes a real worker."""
from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml

from postgres import eventually, free_port
from steps import count_now

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
DASHBOARD = json.loads((CONFIGS / "grafana-dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
HANDLERS = """
from orchestrator import Handler

def fail(task):
    raise RuntimeError("as asked")

def wait(task):
    task.cancelled.wait(3600)

HANDLERS = {"ok": lambda task: None, "wait": wait, "bad": Handler(fail, max_retries=1, base_delay=0.01)}
"""


def get(url: str, **parameters: str) -> Any:
    with urllib.request.urlopen(url + "?" + urllib.parse.urlencode(parameters), timeout=5) as answer:
        return json.load(answer)


def expressions() -> list[str]:
    """Every query of the dashboard, as Grafana would send it with all types chosen."""
    written = [target["expr"] for panel in PANELS for target in panel["targets"]]
    return [expr.replace("$__rate_interval", "6s").replace("$type", ".*") for expr in written]


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Start Prometheus with configs/prometheus.yml, its targets replaced by one address; returns its own address."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed (Debian: prometheus)")
    started: list[subprocess.Popen[bytes]] = []

    def start(target: str) -> str:
        config = yaml.safe_load((CONFIGS / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
        config["rule_files"] = [str(CONFIGS / name) for name in config["rule_files"]]
        job = config["scrape_configs"][0]
        del job["dns_sd_configs"]
        job["static_configs"] = [{"targets": [target]}]
        (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
        address = f"127.0.0.1:{free_port()}"
        with (tmp_path / "prometheus.log").open("wb") as log:
            started.append(subprocess.Popen(
                ["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/tsdb",
                 f"--web.listen-address={address}"], stdout=log, stderr=log, stdin=subprocess.DEVNULL))
        return f"http://{address}"

    yield start
    for process in started:
        process.kill()
        process.wait()


def answered(address: str, expr: str) -> bool:
    """Whether Prometheus has a number for the query, and not only NaN, which a quantile of nothing is."""
    try:
        result = get(f"{address}/api/v1/query", query=expr)["data"]["result"]
    except OSError:
        return False
    return any(math.isfinite(float(sample["value"][1])) for sample in result)


def test_every_query_of_the_dashboard_returns_data_and_the_alerts_see_a_dead_letter(installed, worker_process, prometheus, tmp_path):
    (tmp_path / "some_handlers.py").write_text(HANDLERS)
    worker = worker_process(installed, HANDLERS="some_handlers", HEARTBEAT_INTERVAL="500ms", LEADER_TERM="5s")
    address = prometheus(worker.address.removeprefix("http://"))
    with psycopg.connect(installed, autocommit=True) as conn:
        conn.execute("select orchestrator.enqueue('wait'), orchestrator.limit_type('wait', 7)")
        missing = list(dict.fromkeys(expressions()))

        def all_answered() -> bool:
            conn.execute("select orchestrator.enqueue('ok') from generate_series(1, 20)")
            conn.execute("select orchestrator.enqueue('bad')")
            count_now(conn)
            missing[:] = [expr for expr in missing if not answered(address, expr)]
            return not missing

        try:
            eventually(all_answered, 30)
        except AssertionError:
            pytest.fail(f"without data: {missing}")
    rules = [rule for group in get(f"{address}/api/v1/rules")["data"]["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}
    eventually(lambda: firing(address) == {"DeadLetterQueueGrowth"})
    metrics = set(get(f"{address}/api/v1/label/__name__/values")["data"])
    queries = " ".join(rule["query"] for rule in rules)
    named = set(re.findall(r"\b(?:task|worker|leader|queue|recovery|limit)\w*_\w+(?=[{\[)]| |$)", queries))
    assert len(named) >= 10
    assert named <= metrics


def firing(address: str) -> set[str]:
    return {alert["labels"]["alertname"] for alert in get(f"{address}/api/v1/alerts")["data"]["alerts"] if alert["state"] == "firing"}


def test_the_dashboard_shows_what_an_operator_looks_for():
    titles = " / ".join(panel["title"] for panel in PANELS).lower()
    for wanted in ("throughput", "success and failure", "waiting by type", "pool use", "duration", "queue wait", "leader", "dead letters",
                   "recoveries", "live workers", "in flight under each limit", "parked"):
        assert wanted in titles
    legends = {target["legendFormat"] for panel in PANELS if panel["title"].startswith(("Duration of handlers", "Queue wait"))
               for target in panel["targets"]}
    assert legends == {"p50", "p95", "p99"}


def test_the_dashboard_uses_the_provisioned_data_source():
    provisioned = yaml.safe_load((CONFIGS / "grafana-datasource.yml").read_text())["datasources"][0]
    variable = DASHBOARD["templating"]["list"][0]
    assert (variable["name"], variable["query"]) == ("datasource", provisioned["type"])
    assert variable["current"] == {"selected": True, "text": provisioned["name"], "value": provisioned["uid"]}
    used = {json.dumps(part["datasource"]) for panel in PANELS for part in (panel, *panel["targets"])}
    assert used == {json.dumps({"type": "prometheus", "uid": "${datasource}"})}
    interval = yaml.safe_load((CONFIGS / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert provisioned["jsonData"]["timeInterval"] == interval


def test_the_panels_have_ids_of_their_own_and_do_not_overlap():
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    for place in places:
        assert place["x"] >= 0 and place["x"] + place["w"] <= 24
    for a, b in itertools.combinations(places, 2):
        apart = (a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"] or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"])
        assert apart, (a, b)
