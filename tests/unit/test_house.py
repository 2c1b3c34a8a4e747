"""The house rules of the source: sizes, names, and the direction of imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("src", "testkit", "tests", "benchmarks", "scripts")
MOST_LINES = 450
MOST_FUNCTION_LINES = 80
MOST_PARAMETERS = 12


@cache
def sources(folder: str) -> dict[str, str]:
    """Return the text of every Python file below ``folder``, by its path from the root."""
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"{folder} holds no Python"
    return {str(path.relative_to(ROOT)): path.read_text() for path in files}


def nodes(folder: str) -> Iterator[tuple[str, ast.AST]]:
    for path, text in sources(folder).items():
        for node in ast.walk(ast.parse(text)):
            yield path, node


@pytest.mark.parametrize("folder", FOLDERS)
def test_files_are_short(folder: str) -> None:
    lines = {path: len(text.splitlines()) for path, text in sources(folder).items()}
    assert {path: count for path, count in lines.items() if count > MOST_LINES} == {}, (
        f"split these: a file has at most {MOST_LINES} lines"
    )


@pytest.mark.parametrize("folder", FOLDERS)
def test_functions_are_short_and_take_few_parameters(folder: str) -> None:
    found = []
    for path, node in nodes(folder):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            parameters = sum(isinstance(part, ast.arg) for part in ast.walk(node.args))
            if lines > MOST_FUNCTION_LINES or parameters > MOST_PARAMETERS:
                found.append(f"{path}:{node.lineno} {node.name}: {lines} lines, {parameters} parameters")
    assert found == [], f"a function has at most {MOST_FUNCTION_LINES} lines, {MOST_PARAMETERS} parameters"


def test_a_class_name_has_one_owner() -> None:
    owners: defaultdict[str, list[str]] = defaultdict(list)
    for path, node in nodes("src"):
        if isinstance(node, ast.ClassDef):
            owners[node.name].append(f"{path}:{node.lineno}")
    assert {name: places for name, places in owners.items() if len(places) > 1} == {}, "rename all but one"


def test_modules_import_each_other_in_one_direction() -> None:
    """Counts imports that run, in functions as well; ``CycleError`` names the modules of a circle."""
    graph = grimp.build_graph("tidegate", exclude_type_checking_imports=True, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    order = tuple(TopologicalSorter(imports).static_order())
    assert "tidegate.core.instance" in order


def test_import_contracts() -> None:
    command = (
        "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    )
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_the_deciding_rooms_import_without_torch() -> None:
    check = "import sys, tidegate.systems, tidegate.gateway.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, timeout=60).returncode == 0


def test_tests_take_fixtures_by_argument_and_leave_frozen_objects_alone() -> None:
    found = []
    for path, node in nodes("tests"):
        if isinstance(node, ast.ImportFrom) and (node.module or "").endswith("conftest"):
            found.append(f"{path}:{node.lineno} imports from a conftest: give what it starts its own file")
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "object.__setattr__":
            found.append(f"{path}:{node.lineno} writes into a frozen object: make it with the value")
    assert found == []
