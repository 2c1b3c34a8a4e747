"""The front door: exported names, the pages' examples, a third-party system installed by entry point."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tidegate
from tidegate.core.errors import ConfigError

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "third_party_policy"


def test_the_exported_names() -> None:
    assert tidegate.__all__ == sorted(tidegate.__all__)
    assert set(tidegate.__all__) == {
        "ComparisonResult",
        "SimulationResult",
        "__version__",
        "compare",
        "list_systems",
        "load_trace",
        "simulate",
    }
    for name in tidegate.__all__:
        assert getattr(tidegate, name) is not None
    assert set(tidegate.__all__) <= set(dir(tidegate))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tidegate.nothing


def test_importing_it_imports_nothing_heavy() -> None:
    heavy = ("numpy", "scipy", "matplotlib", "aiohttp", "torch", "pandas", "pydantic")
    program = f"import sys, tidegate; print([name for name in {heavy!r} if name in sys.modules])"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


def test_the_examples_of_the_page_run(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "api.md").read_text(), re.M | re.S)
    assert len(blocks) >= 5
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/api.md", "exec"), names)
    said = capsys.readouterr().out
    assert "400 requests" in said and "unknown system 'arow'" in said


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as told:
        tidegate.simulate(
            "sample:azure-conv",
            "arow",
            instances=0,
            profile="nothing.json",
            split="3",
            slo="fast",
            rate_rps=float("inf"),
        )
    assert len(told.value.problems) == 6
    for word in ("'arow'", "instances 0", "cannot read nothing.json", "split '3'", "'fast'", "rate_rps"):
        assert sum(word in problem for problem in told.value.problems) == 1


def test_a_fleet_that_grows_is_compared_by_instance_hours_and_cost() -> None:
    few = tidegate.load_trace("sample:azure-conv", requests=600)
    options: dict[str, Any] = {"instances": "2..4", "price_per_h": 2.5, "rates_rps": (40.0,)}
    found = tidegate.compare(few, ["static", "dopd"], **options)
    fixed, grown = found.rows
    hours = found.results[0].run.end_s / 3600.0
    assert fixed["instance_hours"] == pytest.approx(2 * hours, rel=0.02), (
        "it begins with the least, and stays"
    )
    assert 1.5 * hours < grown["instance_hours"] < 4.1 * hours
    assert grown["cost"] == pytest.approx(2.5 * grown["instance_hours"])
    assert "cost" not in tidegate.simulate(few, "static", instances=(2, 2), rate_rps=40.0).row()
    with pytest.raises(ConfigError, match="adds up to 6"):
        tidegate.simulate(few, "dopd", instances="2..4", split="3:3")


def test_a_trace_without_a_rate_is_simulated_as_it_comes() -> None:
    result = tidegate.simulate(tidegate.load_trace("sample:azure-conv", requests=1), "static")
    assert (result.rate_rps, result.attainment) == (None, 1.0)


def test_sessions_without_times_start_one_a_second(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    lines = [f"{session},{turn},{100 * (turn + 1)},20,0" for session in range(8) for turn in range(2)]
    path.write_text("\n".join(["session_id,round,input_tokens,output_tokens,prefix_hit_tokens", *lines]))
    trace = tidegate.load_trace(path, turn_gap_s=3)
    assert len(trace) == 16
    assert 1 < trace.arrival_s[-1] < 100


def test_a_profile_may_be_derived(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(
            {
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 8,
                "num_attention_heads": 8,
                "num_key_value_heads": 8,
                "vocab_size": 32000,
            }
        )
    )
    trace = tidegate.load_trace("sample:azure-conv", requests=20)
    small = tidegate.simulate(trace, "static", profile=f"roofline:h100_sxm/{config}")
    assert small.ttft_s() < tidegate.simulate(trace, "static").ttft_s()


def test_results_as_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=lambda columns: columns))
    trace = tidegate.load_trace("sample:azure-conv", requests=60)
    comparison = tidegate.compare(trace, "static", rates_rps=[5, 10])
    table = comparison.results[0].to_pandas()
    assert {len(column) for column in table.values()} == {60}
    assert set(table["prefill_on"]) == {"i0", "i3"} and set(table["outcome"]) == {"ok"}
    assert [row["rate_rps"] for row in comparison.to_pandas()] == [5, 10]


def test_latencies_are_those_of_answered_requests() -> None:
    result = tidegate.simulate("sample:azure-conv", "static", rate_rps=20)
    requests = result.run.requests
    worst = int(requests.ttft_s.argmax())
    assert result.ttft_s(100) == requests.ttft_s[worst]
    requests.outcome[worst] = 1  # failed after its first token
    assert result.ttft_s(100) < requests.ttft_s[worst]


def test_a_result_draws_itself(tmp_path: Path) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("svg")
    trace = tidegate.load_trace("sample:azure-conv", requests=60)
    comparison = tidegate.compare(trace, ["static", "arrow"], rates_rps=[5, 10])
    comparison.plot(tmp_path / "rates.png")
    comparison.results[0].plot(tmp_path / "run.png")
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("rates.png", "run.png"))
    assert (pyplot.get_backend(), pyplot.get_fignums()) == ("svg", [])


def test_the_pages_code_is_that_of_the_example() -> None:
    page = (ROOT / "docs" / "write-a-policy.md").read_text()
    source = (EXAMPLE / "src" / "shortest_queue" / "__init__.py").read_text()
    without_docstrings = re.sub(r'^ +"""[^"]*"""\n+', "", source, flags=re.M)
    for block in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S):
        assert block.rstrip() in without_docstrings


@pytest.mark.parametrize("instances", [1, 4])
def test_an_installed_system_is_found_by_its_entry_point(tmp_path: Path, instances: int) -> None:
    package = tmp_path / "site"
    (package / "tidegate_shortest_queue-0.1.0.dist-info").mkdir(parents=True)
    (package / "shortest_queue").symlink_to(EXAMPLE / "src" / "shortest_queue")
    about = package / "tidegate_shortest_queue-0.1.0.dist-info"
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: tidegate-shortest-queue\nVersion: 0.1.0\n")
    declared = re.search(
        r'\[project\.entry-points\."(tidegate\.systems)"\]\n(.*?)\n\n',
        (EXAMPLE / "pyproject.toml").read_text(),
        re.S,
    )
    assert declared is not None
    (about / "entry_points.txt").write_text(f"[{declared[1]}]\n{declared[2].replace(chr(34), '')}\n")
    command = [sys.executable, "-m", "tidegate", "sim", "--system", "shortest-queue+edf"]
    said = subprocess.run(
        [*command, "--requests", "1500", "--rate", "60", "--instances", str(instances), "--json"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(package), str(ROOT / "src")])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert '"system": "shortest-queue+edf"' in said.stdout
    moved = re.search(r'"migrations": (\d+)', said.stdout)
    assert moved is not None and (int(moved[1]) > 0) == (instances > 1)
