"""Write k8s/prometheusrule.yaml from configs/alerts.yml, so that there is one source of alerts. tests/test_k8s.py compares them."""
from __future__ import annotations

import textwrap
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
HEAD = """# For the Prometheus operator. Written by tools/k8s_alerts.py from configs/alerts.yml: change it there.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: orchestrator
  namespace: orchestrator
  labels: {app.kubernetes.io/name: orchestrator}
spec:
"""


def prometheus_rule() -> str:
    return HEAD + textwrap.indent((REPOSITORY / "configs" / "alerts.yml").read_text("utf-8"), "  ")


if __name__ == "__main__":
    (REPOSITORY / "k8s" / "prometheusrule.yaml").write_text(prometheus_rule(), "utf-8")
