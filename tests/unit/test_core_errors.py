"""The tree of errors and its table of statuses."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from tidegate.core import errors
from tidegate.core.errors import (
    STATUS,
    ConfigError,
    EngineError,
    SetupError,
    TidegateError,
    TraceError,
    WrongMethod,
    status_of,
)


def leaves(cls: type[TidegateError]) -> list[type[TidegateError]]:
    below = cls.__subclasses__()
    return [leaf for sub in below for leaf in leaves(sub)] if below else [cls]


def test_every_served_leaf_has_a_status_of_its_own() -> None:
    served = {leaf for leaf in leaves(TidegateError) if not issubclass(leaf, SetupError)}
    assert served == set(STATUS)


def test_labels_are_distinct() -> None:
    assert len({row.label for row in STATUS.values()}) == len(STATUS)


def test_a_subclass_takes_its_ancestors_status_and_strangers_are_internal() -> None:
    class Overrun(errors.EngineTimeout):
        pass

    assert status_of(Overrun("late")).http == 504
    assert status_of(EngineError("of no known kind")).label == "internal"


def test_config_error_lists_every_problem() -> None:
    error = ConfigError(["port is not a number", "unknown key 'colour'"])
    assert error.problems == ["port is not a number", "unknown key 'colour'"]
    assert str(error) == "port is not a number\nunknown key 'colour'"
    assert ConfigError("one").problems == ["one"]


@pytest.mark.parametrize(
    ("line", "column", "expected"),
    [(0, 0, "t.csv: bad"), (3, 0, "t.csv:3: bad"), (3, 7, "t.csv:3:7: bad")],
)
def test_trace_error_names_the_place(line: int, column: int, expected: str) -> None:
    assert str(TraceError("bad", file="t.csv", line=line, column=column)) == expected


@pytest.mark.parametrize("kind", leaves(TidegateError))
def test_every_error_survives_the_way_from_a_worker_process(kind: type[TidegateError]) -> None:
    needed: dict[type[TidegateError], dict[str, Any]] = {
        TraceError: {"file": "t.csv", "line": 2},
        WrongMethod: {"allowed": ["GET"]},
    }
    fields = (more for each, more in needed.items() if issubclass(kind, each))
    error = kind("bad", **next(fields, {}))
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (kind, str(error), vars(error))
