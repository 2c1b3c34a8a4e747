"""Writes what Prometheus and Grafana need to watch a gateway: a scrape job, rules with alerts, a board.

    python scripts/observe.py FOLDER [--gateway HOST:PORT]

``PANELS`` and ``ALERTS`` hold every query; a test runs each against the metrics that a gateway exposes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple


class Panel(NamedTuple):
    """A graph of the board; ``queries`` are (PromQL, legend)."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]


class Alert(NamedTuple):
    """An alert that fires once ``expr`` has held for ``hold``."""

    name: str
    expr: str
    hold: str
    summary: str


def _quantiles(metric: str) -> tuple[tuple[str, str], ...]:
    return tuple(
        (f"histogram_quantile({q}, sum by (le) (rate({metric}_bucket[1m])))", f"p{q * 100:.0f}")
        for q in (0.5, 0.9, 0.99)
    )


ATTAINMENT = "tidegate:slo_attainment:ratio_5m"
REFUSED = "bad_request|prompt_too_long|unknown_model|client_gone"
"""Outcomes that say nothing about the service."""
SERVED = f'tidegate_requests_total{{outcome!~"{REFUSED}"}}'
RECORDED = {ATTAINMENT: f"sum(rate(tidegate_requests_attained_total[5m])) / sum(rate({SERVED}[5m]))"}
"""Recording rules by name."""

PANELS = (
    Panel("SLO attainment", "percentunit", ((ATTAINMENT, "attained"),)),
    Panel(
        "Requests by outcome",
        "reqps",
        (("sum by (outcome) (rate(tidegate_requests_total[1m]))", "{{outcome}}"),),
    ),
    Panel("TTFT", "s", _quantiles("tidegate_ttft_seconds")),
    Panel("TPOT", "s", _quantiles("tidegate_tpot_seconds")),
    Panel(
        "Requests in flight",
        "short",
        (("tidegate_requests_in_flight", "in flight"), ("tidegate_requests_held", "held")),
    ),
    Panel("Role (0 prefill, 1 decode, 2 mixed)", "short", (("tidegate_instance_role", "{{member}}"),)),
    Panel("Prefill queue", "s", (("tidegate_instance_prefill_wait_seconds", "{{member}}"),)),
    Panel("Tokens being decoded", "short", (("tidegate_instance_decode_tokens", "{{member}}"),)),
    Panel(
        "Mean seconds of a request by stage",
        "s",
        (
            (
                "sum by (stage) (rate(tidegate_stage_seconds_sum[1m])) / "
                "sum by (stage) (rate(tidegate_stage_seconds_count[1m]))",
                "{{stage}}",
            ),
        ),
    ),
    Panel(
        "Flips and migrations",
        "short",
        (
            ("sum by (to) (increase(tidegate_flips_total[5m]))", "flips to {{to}}"),
            ("sum by (event) (increase(tidegate_migrations_total[5m]))", "migrations {{event}}"),
        ),
    ),
    Panel("Replays", "reqps", (("sum by (reason) (rate(tidegate_replays_total[1m]))", "{{reason}}"),)),
    Panel(
        "Tokens",
        "short",
        (
            ("rate(tidegate_prompt_tokens_total[1m])", "prompt"),
            ("rate(tidegate_output_tokens_total[1m])", "output"),
        ),
    ),
    Panel("KV moved", "Bps", (("rate(tidegate_kv_transfer_bytes_total[1m])", "between instances"),)),
    Panel(
        "Error of predicted prefill times",
        "percentunit",
        _quantiles("tidegate_prefill_prediction_error_ratio")[:2],
    ),
)

ALERTS = (
    Alert("TidegateDown", 'up{job="tidegate"} == 0', "1m", "The gateway does not answer."),
    Alert("TidegateSloMissed", f"{ATTAINMENT} < 0.9", "5m", "Fewer than 90 % of requests met their SLO."),
    Alert(
        "TidegateEngineFaults",
        "sum(rate(tidegate_replays_total[5m])) > 0.1",
        "5m",
        "More than one request in ten seconds begins again after an engine failed it.",
    ),
    Alert(
        "TidegateHolds", "tidegate_requests_held > 0", "2m", "Requests have waited to be placed for minutes."
    ),
    Alert(
        "TidegateFlipsTooOften",
        "sum(increase(tidegate_flips_total[10m])) > 30",
        "10m",
        "Roles change more than three times a minute.",
    ),
    Alert(
        "TidegateLoadDrift",
        "sum by (member) (increase(tidegate_load_drift_total[10m])) > 0",
        "0m",
        "{{ $labels.member }} runs something else than the gateway sent, or lost requests.",
    ),
)


def scrape_config(gateway: str) -> str:
    """Return a prometheus.yml that scrapes ``gateway`` (host:port) and reads the rules."""
    return f"""global:
  scrape_interval: 5s
rule_files: [rules.yml]
scrape_configs:
  - job_name: tidegate
    # With an API key: authorization: {{credentials_file: /path/to/key}}
    static_configs:
      - targets: ["{gateway}"]
"""


def rules() -> str:
    """Return the recording rules and alerts. Each text is JSON, which YAML contains."""
    lines = ["groups:", "  - name: tidegate", "    rules:"]
    for name, expr in RECORDED.items():
        lines += [f"      - record: {name}", f"        expr: {json.dumps(expr)}"]
    for alert in ALERTS:
        lines += [
            f"      - alert: {alert.name}",
            f"        expr: {json.dumps(alert.expr)}",
            f"        for: {alert.hold}",
            f"        annotations: {{summary: {json.dumps(alert.summary)}}}",
        ]
    return "\n".join(lines) + "\n"


def board() -> dict[str, object]:
    """Return a Grafana board, two graphs a row."""
    panels = [
        {
            "id": i + 1,
            "title": panel.title,
            "type": "timeseries",
            "datasource": {"type": "prometheus", "uid": "${datasource}"},
            "gridPos": {"x": 12 * (i % 2), "y": 8 * (i // 2), "w": 12, "h": 8},
            "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
            "targets": [
                {"refId": chr(65 + k), "expr": expr, "legendFormat": legend}
                for k, (expr, legend) in enumerate(panel.queries)
            ],
        }
        for i, panel in enumerate(PANELS)
    ]
    choice = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    return {
        "title": "tidegate",
        "uid": "tidegate",
        "schemaVersion": 39,
        "refresh": "5s",
        "time": {"from": "now-15m", "to": "now"},
        "templating": {"list": [choice]},
        "panels": panels,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where to write the three files")
    parser.add_argument("--gateway", default="127.0.0.1:8000", metavar="HOST:PORT", help="what to scrape")
    choice = parser.parse_args()
    choice.folder.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("prometheus.yml", scrape_config(choice.gateway)),
        ("rules.yml", rules()),
        ("board.json", json.dumps(board(), indent=1) + "\n"),
    ):
        (choice.folder / name).write_text(text)
        print(choice.folder / name)


if __name__ == "__main__":
    main()
