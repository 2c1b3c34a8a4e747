"""A kept result is found again only while all code that it depends on is the same."""

from __future__ import annotations

from pathlib import Path

import pytest

import tidegate
from tidegate.experiments.code_digest import code_digest
from tidegate.experiments.setting import Setting, SimulatedFleet
from tidegate.workloads.choice import WorkloadChoice

EXAMPLE = Path(__file__).parents[2] / "examples/third_party_policy/src/shortest_queue/__init__.py"


def digest(system: str, trace: str = "sample:azure-conv") -> str:
    code_digest.cache_clear()
    return Setting(WorkloadChoice(trace=trace), SimulatedFleet(()), system).digest(rate_rps=1.0)


@pytest.fixture
def in_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_an_edit_anywhere_in_a_systems_code_gives_another_name(in_path: Path) -> None:
    """Its file, a module that it imports at its top, one that it imports while it runs, and a package's."""
    package = in_path / "far_helpers"
    package.mkdir()
    (package / "__init__.py").write_text("")
    file, near, lazy, deep = (
        in_path / "mine.py", in_path / "near_helper.py", in_path / "lazy_helper.py", package / "deep.py",
    )  # fmt: skip
    (in_path / "stranger.py").write_text("X = 1")
    near.write_text("X = 1")
    lazy.write_text("from far_helpers import deep")
    deep.write_text("X = 1")
    file.write_text(f"{EXAMPLE.read_text()}\nimport near_helper\ndef late():\n    import lazy_helper\n")
    system = f"{file}:shortest_queue"
    seen = {digest(system)}
    assert digest(system) in seen
    for edited in (file, near, lazy, deep):
        edited.write_text(edited.read_text() + "\nY = 2\n")
        assert digest(system) not in seen, edited.name
        seen.add(digest(system))
    (in_path / "stranger.py").write_text("X = 2")
    assert digest(system) in seen
    assert digest(system) != digest(f"{system}+edf")


def test_an_edit_of_this_package_gives_other_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "policy.py").write_text("X = 1")
    monkeypatch.setattr(tidegate, "__file__", str(tmp_path / "__init__.py"))
    seen = {name: digest(name) for name in ("static", "")}
    (tmp_path / "policy.py").write_text("X = 2")
    assert all(digest(name) != before for name, before in seen.items())
