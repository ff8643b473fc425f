"""Dockerfile, docker-compose.yml, .env.example and Makefile agree with each other, with Config and with docs/settings.md.

That the image and the profiles run is shown by tests/docker/verify.sh, which needs a Docker engine.
"""
from __future__ import annotations

import dataclasses
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator import Config, _duration

REPOSITORY = Path(__file__).resolve().parent.parent
COMPOSE = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())
SERVICES = COMPOSE["services"]
WORKERS = [name for name in SERVICES if name.startswith("worker")]
FIELDS = {field.name.upper(): field for field in dataclasses.fields(Config)}


def text(name: str) -> str:
    return (REPOSITORY / name).read_text()


def parsed(name: str, value: str) -> Any:
    return FIELDS[name].metadata["parse"](value) if value else FIELDS[name].default


def example() -> dict[str, tuple[str, str]]:
    """Of .env.example: {name: (comment above it, value)}."""
    return {name: (comment, value) for comment, name, value in re.findall(r"(?m)^# (.*)\n#([A-Z_]+)=(.*)$", text(".env.example"))}


def test_env_example_documents_every_setting_with_its_default():
    documented = example()
    assert [name for name in documented if name in FIELDS] == list(FIELDS)   # in Config's order
    for name, field in FIELDS.items():
        comment, value = documented[name]
        assert comment == field.metadata["help"]
        assert parsed(name, value) == field.default, name


def test_settings_table_is_every_setting_with_its_default():
    rows = dict(re.findall(r"(?m)^\| `([A-Z_]+)` \| (?:`([^`]*)`)? \| .* \|$", text("docs/settings.md")))
    assert list(rows) == list(FIELDS)
    for name, field in FIELDS.items():
        assert parsed(name, rows[name]) == field.default, name
        assert field.metadata["help"] in text("docs/settings.md")


def test_env_example_names_what_the_handlers_and_compose_read():
    names = set(re.findall(r"(?m)^#([A-Z_]+)=", text(".env.example")))
    of_handlers = set(re.findall(r"(?m)^  ([A-Z_]{4,}) {2,}", text("handlers.py").split('"""')[1]))
    of_compose = set(re.findall(r"\$\{([A-Z_]+)", text("docker-compose.yml")))
    assert of_handlers and of_compose
    assert names == set(FIELDS) | of_handlers | of_compose


def test_env_example_uncommented_is_what_make_and_config_accept(tmp_path):
    (tmp_path / ".env").write_text(re.sub(r"(?m)^#([A-Z_]+=.+)$", r"\1", text(".env.example")))
    (tmp_path / "Makefile").write_text(text("Makefile") + "\nshow:\n\t@env\n")
    done = subprocess.run(["make", "-s", "show", "MAKECMDGOALS=run"], cwd=tmp_path, check=True, capture_output=True, text=True,
                          env={"PATH": "/usr/bin:/bin"})
    environment = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert environment["WORKER_POOL_SIZE"] == "10"
    assert Config.load(environ=environment) == Config()


def test_env_is_never_put_into_the_image_or_the_repository():
    assert ".env" in text(".gitignore").split()
    ignored = text(".dockerignore").splitlines()
    assert "*" in ignored and not any(line.startswith("!.env") for line in ignored)


def test_dockerignore_lets_in_what_the_dockerfile_copies():
    allowed = {line[1:] for line in text(".dockerignore").splitlines() if line.startswith("!")}
    copied = {word for line in re.findall(r"(?m)^COPY (?!--from)(.+)$", text("Dockerfile")) for word in line.split()[:-1]}
    assert copied == allowed
    assert all((REPOSITORY / name).exists() for name in copied)


def test_image_is_pinned_unprivileged_and_gets_signals():
    dockerfile = text("Dockerfile")
    assert set(re.findall(r"(?m)^FROM (\S+)", dockerfile)) == {"python:3.13-slim-trixie"}
    assert re.search(r"(?m)^USER (?!0)\d+:\d+$", dockerfile)
    assert 'ENTRYPOINT ["tini", "--", "python", "/app/orchestrator.py"]' in dockerfile
    assert "/health" in dockerfile.split("HEALTHCHECK")[1]


def test_images_of_compose_have_a_version():
    for name, service in SERVICES.items():
        if "build" not in service:
            assert re.fullmatch(r"[\w./-]+:v?\d[\w.]*", service["image"]), name
    assert int(SERVICES["db"]["image"].split(":")[1]) >= 16


def test_everything_listens_on_the_loopback_address_on_the_documented_ports():
    defaults = {name: [re.sub(r"\$\{\w+:-(\d+)\}", r"\1", port) for port in service.get("ports", [])] for name, service in SERVICES.items()}
    assert defaults == {
        "db": ["127.0.0.1:5433:5432"], "orchestrator": ["127.0.0.1:9090:9090"], "worker-1": ["127.0.0.1:9091:9090"],
        "worker-2": ["127.0.0.1:9092:9090"], "worker-3": ["127.0.0.1:9093:9090"], "worker": [],
        "prometheus": ["127.0.0.1:9090:9090"], "grafana": ["127.0.0.1:3000:3000"]}


def test_profiles_are_the_documented_ones():
    assert {name for name, service in SERVICES.items() if "profiles" not in service} == {"db", "orchestrator"}
    assert all(service["profiles"] == ["distributed"] for service in SERVICES.values() if "profiles" in service)


def test_nothing_is_in_the_way_of_scaling():
    assert not any("container_name" in service for service in SERVICES.values())
    assert "ports" not in SERVICES["worker"]
    # Prometheus finds all of them by one name
    name = yaml.safe_load(text("configs/prometheus.yml"))["scrape_configs"][0]["dns_sd_configs"][0]
    assert name["names"] == ["worker"] and name["port"] == 9090
    assert all(SERVICES[worker]["networks"]["default"]["aliases"] == ["worker"] for worker in WORKERS if worker != "worker")


@pytest.mark.parametrize("name", ["orchestrator", *WORKERS])
def test_settings_of_a_service_are_accepted_and_it_may_finish_its_tasks(name):
    service = SERVICES[name]
    environment = {key: re.sub(r"\$\{\w+:-(\w+)\}", r"\1", value) for key, value in service["environment"].items()}
    config = Config.load(environ=environment)
    assert set(environment) <= set(FIELDS)
    assert config.distributed_mode is (name != "orchestrator")
    assert (config.metrics_host, config.metrics_port) == ("0.0.0.0", 9090)
    assert _duration(service["stop_grace_period"]) >= config.shutdown_grace + 5
    assert service["read_only"] and service["cap_drop"] == ["ALL"]


def test_files_that_compose_mounts_exist():
    mounted = [volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", []) if volume.startswith("./")]
    assert len(mounted) == 5
    for path in mounted:
        assert (REPOSITORY / path).is_file(), path


def test_grafana_is_provisioned_with_the_datasource_and_the_dashboard():
    mounts = dict(volume.split(":")[:2] for volume in SERVICES["grafana"]["volumes"])
    [provider] = yaml.safe_load(text("configs/grafana-dashboards.yml"))["providers"]
    assert str(Path(mounts["./configs/grafana-dashboard.json"]).parent) == provider["options"]["path"]
    assert mounts["./configs/grafana-datasource.yml"].startswith("/etc/grafana/provisioning/datasources/")
    assert mounts["./configs/grafana-dashboards.yml"].startswith("/etc/grafana/provisioning/dashboards/")
    [source] = yaml.safe_load(text("configs/grafana-datasource.yml"))["datasources"]
    assert source["url"] == "http://prometheus:9090" and source["type"] == "prometheus"
    dashboard = json.loads(text("configs/grafana-dashboard.json"))
    variables = {v["name"]: v for v in dashboard["templating"]["list"]}
    assert uids(dashboard["panels"]) == {"${datasource}"}   # the variable, whose choices are the sources of this type
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", source["type"])


def uids(dashboard: Any) -> set[str]:
    """Of every datasource that it names."""
    if isinstance(dashboard, list):
        return set().union(*map(uids, dashboard))
    if not isinstance(dashboard, dict):
        return set()
    own = dashboard.get("datasource")
    return set().union(*map(uids, dashboard.values()), {own["uid"]} if isinstance(own, dict) else set())


def test_workflow_runs_the_same_make_targets_on_every_version():
    workflow = yaml.safe_load(text(".github/workflows/ci.yml"))
    matrix = workflow["jobs"]["test"]["strategy"]["matrix"]
    assert matrix == {"postgres": ["16", "17", "18"], "python": ["3.11", "3.12", "3.13", "3.14"]}
    targets = set(re.findall(r"(?m)^([a-z-]+):.*##", text("Makefile")))
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    used = {word for command in commands for word in re.findall(r"(?m)^\s*make (?:-s )?([a-z-]+)", command)}
    assert {"test", "check", "demo", "try-bundle", "build", "docker-build"} <= used <= targets
    assert workflow["permissions"] == {"contents": "read"}


def test_workflow_tries_the_oldest_pinned_dependencies():
    oldest = dict(re.findall(r"(?m)^([\w-]+(?:\[\w+\])?)>=([\d.]+)", text("requirements.txt")))
    commands = "\n".join(step.get("run", "") for step in yaml.safe_load(text(".github/workflows/ci.yml"))["jobs"]["oldest"]["steps"])
    pinned = dict(re.findall(r"([\w-]+(?:\[\w+\])?)==([\d.]+)", commands))
    assert set(pinned) == {"psycopg[binary]", "prometheus-client"}
    for name, version in pinned.items():
        assert version in (oldest[name], oldest[name] + ".0"), name


def test_release_attaches_what_was_built_and_only_its_job_may_write():
    workflow = yaml.safe_load(text(".github/workflows/release.yml"))
    assert workflow[True] == {"push": {"tags": ["v*"]}}   # YAML reads `on` as true
    assert workflow["permissions"] == {"contents": "read"}
    assert {name: job.get("permissions") for name, job in workflow["jobs"].items()} == {"ci": None, "release": {"contents": "write"}}
    assert workflow["jobs"]["release"]["needs"] == "ci"
    commands = "\n".join(step.get("run", "") for step in workflow["jobs"]["release"]["steps"])
    assert "make build" in commands
    assert re.search(r"gh release create .* dist/orchestrator\.py dist/\*\.whl", commands)


def test_ci_run_runs_the_targets_that_people_run():
    script = text(".ci/run")
    for line in ("make check", "make test", "make try-bundle", "make build", "make chaos", "demo ARGS=--exit"):
        assert line in script, line


def test_make_has_the_targets_of_docker():
    done = subprocess.run(["make", "-n", "docker-build", "docker-up", "docker-logs", "docker-up-dist", "docker-logs-dist", "docker-down"],
                          cwd=REPOSITORY, check=True, capture_output=True, text=True)
    assert "--profile distributed up -d --build --wait --scale orchestrator=0" in done.stdout
