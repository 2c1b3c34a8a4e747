"""The queries that `make observe` writes ask for metrics and labels that the gateway has."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.gateway.gateway_cluster import Start
from tidegate.core.errors import STATUS

observe = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "observe.py")))
SELECTED = re.compile(r"\b(tidegate_\w+)(?:\{([^}]*)\})?")
GROUPED = re.compile(r"\bby \(([^)]*)\)")


async def test_every_query_finds_its_metric(start: Start) -> None:
    cluster = await start("static", instances=2)
    assert (await cluster.post("/v1/completions", {"prompt": "The tide", "max_tokens": 4}))[0] == 200
    metrics = cluster.gateway.dispatcher.metrics
    metrics.flips.labels(to="decode", reason="x")
    metrics.replays.labels(reason="x")
    metrics.load_drift.labels(member="i0", kind="kv")
    async with cluster.client.get(cluster.url + "/metrics") as response:
        shown = await response.text()
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(shown):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)

    queries = [query for panel in observe.PANELS for query in panel.queries]
    queries += [
        (alert.expr, " ".join(re.findall(r"\$labels\.(\w+)", alert.summary))) for alert in observe.ALERTS
    ]
    queries += [(expr, "") for expr in observe.RECORDED.values()]
    for expr, legend in queries:
        names = SELECTED.findall(expr)
        assert names or observe.ATTAINMENT in expr or "up{" in expr, expr
        used = {label for grouped in GROUPED.findall(expr) for label in re.split(r"\W+", grouped)}
        used |= set(re.findall(r"\{\{(\w+)\}\}", legend))
        for name, selector in names:
            assert name in labels, f"{expr}: the gateway has no {name}"
            asked = used | {part.partition("!")[0].partition("=")[0] for part in selector.split(",") if part}
            assert asked <= labels[name] | {"le"}, f"{expr}: {name} has {labels[name]}"


def test_files_are_what_the_programs_read() -> None:
    assert set(observe.REFUSED.split("|")) <= {row.label for row in STATUS.values()}
    scrape = yaml.safe_load(observe.scrape_config("gateway:9000"))
    assert scrape["scrape_configs"][0]["static_configs"] == [{"targets": ["gateway:9000"]}]
    (group,) = yaml.safe_load(observe.rules())["groups"]
    assert [rule["expr"] for rule in group["rules"]] == [
        *observe.RECORDED.values(),
        *(alert.expr for alert in observe.ALERTS),
    ]
    panels = json.loads(json.dumps(observe.board()))["panels"]
    assert [panel["title"] for panel in panels] == [panel.title for panel in observe.PANELS]
