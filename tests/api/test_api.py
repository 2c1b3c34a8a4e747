"""The front door: exported names, the pages' examples, a third-party system installed by entry point."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tidegate

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


def test_a_result_draws_itself(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    trace = tidegate.load_trace("sample:azure-conv", requests=60)
    comparison = tidegate.compare(trace, ["static", "arrow"], rates_rps=[5, 10])
    comparison.plot(tmp_path / "rates.png")
    comparison.results[0].plot(tmp_path / "run.png")
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("rates.png", "run.png"))


def test_the_pages_code_is_that_of_the_example() -> None:
    page = (ROOT / "docs" / "write-a-policy.md").read_text()
    source = (EXAMPLE / "src" / "shortest_queue" / "__init__.py").read_text()
    without_docstrings = re.sub(r'^ +"""[^"]*"""\n+', "", source, flags=re.M)
    for block in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S):
        assert block.rstrip() in without_docstrings


def test_an_installed_system_is_found_by_its_entry_point(tmp_path: Path) -> None:
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
        [*command, "--requests", "1500", "--rate", "60", "--json"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(package), str(ROOT / "src")])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert '"system": "shortest-queue+edf"' in said.stdout
    moved = re.search(r'"migrations": (\d+)', said.stdout)
    assert moved is not None and int(moved[1]) > 0
