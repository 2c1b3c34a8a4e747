"""Names, and the errors that say what exists."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints

import pytest

from tidegate.core.errors import ConfigError
from tidegate.policies import registry as registry_module
from tidegate.policies.registry import Registry


def test_register_returns_the_object_and_get_finds_it() -> None:
    numbers: Registry[int] = Registry("number")
    assert numbers.register("two")(2) == 2
    assert numbers.get("two") == 2


def test_an_unknown_name_lists_what_exists() -> None:
    numbers: Registry[int] = Registry("number")
    numbers.register("two")(2)
    numbers.register("one")(1)
    with pytest.raises(ConfigError, match="unknown number 'three'; there are: one, two"):
        numbers.get("three")


def test_a_name_is_taken_once() -> None:
    numbers: Registry[int] = Registry("number")
    numbers.register("two")(2)
    with pytest.raises(ConfigError, match="twice"):
        numbers.register("two")(22)


def test_third_parties_add_names_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    points = EntryPoints([EntryPoint("tau", "math:tau", "tidegate.numbers")])
    monkeypatch.setattr(registry_module, "entry_points", lambda **by: points.select(**by))
    numbers: Registry[float] = Registry("number", group="tidegate.numbers")
    numbers.register("one")(1.0)
    assert numbers.names() == ("one", "tau")
    assert numbers.get("tau") == pytest.approx(6.2832, abs=1e-4)
