"""k8s/: valid against Kubernetes' own schemas, and consistent with Config, the image, the alerts and the roles."""
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import psycopg
import pytest
import yaml
from psycopg.conninfo import conninfo_to_dict

from orchestrator import Config
from steps import enqueue, value
from tools import k8s_alerts

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDER = REPOSITORY / "k8s"
FILES = sorted(path for path in FOLDER.glob("*.yaml") if path.name != "kustomization.yaml")
CUSTOM = {"ScaledObject", "TriggerAuthentication", "ServiceMonitor", "PrometheusRule", "Cluster"}   # schemas of their operators


def documents(name: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all((FOLDER / name).read_text()) if document]


def everything() -> list[dict[str, Any]]:
    return [document for file in FILES for document in documents(file.name)]


def only(kind: str, name: str | None = None) -> dict[str, Any]:
    [found] = [d for d in everything() if d["kind"] == kind and name in (None, d["metadata"]["name"])]
    return found


def pods() -> list[dict[str, Any]]:
    return [only(kind)["spec"]["template"]["spec"] for kind in ("Deployment", "Job")]


def environment(pod: dict[str, Any]) -> dict[str, Any]:
    """Its settings; what comes from the secret as in the example of it."""
    secret = only("Secret", "orchestrator")["stringData"]
    [container] = pod["containers"]
    return {e["name"]: e["value"] if "value" in e else secret[e["valueFrom"]["secretKeyRef"]["key"]] for e in container["env"]}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_manifest_is_valid(file):
    for document in documents(file.name):
        if document["kind"] not in CUSTOM:
            kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_validation_finds_a_misspelt_field():
    deployment = only("Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["readinessProb"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, kubernetes_validate.latest_version(), strict=True)


def test_everything_is_in_one_namespace():
    name = only("Namespace")["metadata"]["name"]
    assert {d["metadata"]["namespace"] for d in everything() if d["kind"] != "Namespace"} == {name}
    assert documents("kustomization.yaml")[0]["namespace"] == name


def test_kustomization_lists_every_file_but_the_secret_and_the_other_autoscaler():
    [kustomization] = documents("kustomization.yaml")
    left_out = {"secret.example.yaml", "hpa.yaml"}
    assert sorted(kustomization["resources"]) == sorted({file.name for file in FILES} - left_out)
    images = {container["image"] for pod in pods() for container in pod["containers"]}
    assert {image["name"] for image in kustomization["images"]} == images


@pytest.mark.parametrize("pod", pods(), ids=["deployment", "job"])
def test_settings_are_ones_that_config_knows_and_accepts(pod):
    settings = environment(pod)
    assert set(settings) <= {name.upper() for name in Config.__dataclass_fields__}
    assert Config.load(environ=settings).database_url == settings["DATABASE_URL"]


def test_workers_are_distributed_and_reachable_where_the_probes_and_the_service_look():
    pod = pods()[0]
    [container] = pod["containers"]
    config = Config.load(environ=environment(pod))
    assert config.distributed_mode and config.metrics_host == "0.0.0.0"
    assert container["ports"] == [{"name": "http", "containerPort": config.metrics_port}]
    probes = [container[probe]["httpGet"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")]
    assert probes == [{"path": path, "port": "http"} for path in ("/health", "/health", "/ready")]
    [port] = only("Service")["spec"]["ports"]
    assert (port["name"], port["targetPort"]) == ("http", "http")


def test_termination_waits_for_the_grace_period_and_the_goodbye():
    pod = pods()[0]
    [container] = pod["containers"]
    pre_stop = float(container["lifecycle"]["preStop"]["exec"]["command"][-1])
    grace = Config.load(environ=environment(pod)).shutdown_grace
    assert pod["terminationGracePeriodSeconds"] >= pre_stop + grace + 5


@pytest.mark.parametrize("pod", pods(), ids=["deployment", "job"])
def test_pods_are_confined(pod):
    [container] = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    user = re.search(r"USER (\d+):(\d+)", (REPOSITORY / "Dockerfile").read_text())
    assert user and (pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsGroup"]) == (int(user[1]), int(user[2]))
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
                                            "capabilities": {"drop": ["ALL"]}}
    assert container["resources"]["requests"] and container["resources"]["limits"]
    assert pod["automountServiceAccountToken"] is False


def test_selectors_match_the_workers_and_not_the_job():
    labels = only("Deployment")["spec"]["template"]["metadata"]["labels"]
    affinity = pods()[0]["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"][0]["podAffinityTerm"]
    selectors = [only("Deployment")["spec"]["selector"]["matchLabels"], only("Service")["spec"]["selector"],
                 only("PodDisruptionBudget")["spec"]["selector"]["matchLabels"], affinity["labelSelector"]["matchLabels"]]
    for selector in selectors:
        assert selector.items() <= labels.items()
        assert not selector.items() <= only("Job")["spec"]["template"]["metadata"]["labels"].items()


def test_service_monitor_finds_the_service_under_the_name_that_alerts_use():
    monitor, service = only("ServiceMonitor"), only("Service")
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    [endpoint] = monitor["spec"]["endpoints"]
    assert endpoint["port"] == service["spec"]["ports"][0]["name"]
    assert endpoint["authorization"]["credentials"]["key"] in only("Secret", "orchestrator")["stringData"]
    assert set(re.findall(r'job="([^"]+)"', (REPOSITORY / "configs" / "alerts.yml").read_text())) == {service["metadata"]["name"]}


def test_prometheus_rule_is_the_alerts_of_configs():
    assert (FOLDER / "prometheusrule.yaml").read_text() == k8s_alerts.prometheus_rule(), "run python tools/k8s_alerts.py"
    alerts = yaml.safe_load((REPOSITORY / "configs" / "alerts.yml").read_text())
    assert only("PrometheusRule")["spec"] == alerts


def test_autoscalers_aim_at_the_deployment_by_queue_depth(installed, conn):
    scaled, hpa = only("ScaledObject")["spec"], only("HorizontalPodAutoscaler")["spec"]
    name = only("Deployment")["metadata"]["name"]
    assert scaled["scaleTargetRef"]["name"] == hpa["scaleTargetRef"]["name"] == name
    [trigger] = scaled["triggers"]
    assert trigger["authenticationRef"]["name"] == only("TriggerAuthentication")["metadata"]["name"]
    assert only("TriggerAuthentication")["spec"]["secretTargetRef"][0]["key"] in only("Secret", "orchestrator")["stringData"]
    for kind in ("a", "a", "b"):
        enqueue(conn, kind)
    conn.execute("select orchestrator.pause_type('b')")
    with psycopg.connect(installed, autocommit=True) as scaler:
        scaler.execute("set role orchestrator_auditor")
        assert value(scaler, trigger["metadata"]["query"]) == 2


def test_database_has_three_instances_the_four_roles_and_the_logins_of_the_secrets():
    cluster = only("Cluster")["spec"]
    assert cluster["instances"] == 3
    assert cluster["postgresql"]["synchronous"]["number"] >= 1
    roles = {role["name"]: role for role in cluster["managed"]["roles"]}
    granted = set(re.findall(r"orchestrator_\w+", (REPOSITORY / "sql" / "90_roles.sql").read_text()))
    assert {name for name, role in roles.items() if not role["login"]} == {r for r in granted if not r.endswith("_")}
    logins = {s["stringData"]["username"]: s["stringData"]["password"] for s in everything()
              if s["kind"] == "Secret" and "username" in s["stringData"]}
    assert {name for name, role in roles.items() if role["login"]} | {cluster["bootstrap"]["initdb"]["owner"]} == set(logins)
    urls = [conninfo_to_dict(text) for name, text in only("Secret", "orchestrator")["stringData"].items() if name.endswith("_URL")]
    assert {(url["user"], url["password"]) for url in urls} == set(logins.items())
    assert {url["dbname"] for url in urls} == {cluster["bootstrap"]["initdb"]["database"]}


def test_workers_connect_to_several_hosts_and_pick_the_primary():
    name = only("Cluster")["metadata"]["name"]
    url = conninfo_to_dict(only("Secret", "orchestrator")["stringData"]["DATABASE_URL"])
    assert str(url["host"]).split(",") == [f"{name}-rw", f"{name}-r"]
    assert url["target_session_attrs"] == "read-write"
