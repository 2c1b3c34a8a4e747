"""Options made from settings: names, defaults and types once, every problem at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from tidegate.cli.options import SHARE, Flag, OptionGroup, at_least, expanded, given
from tidegate.core.errors import ConfigError
from tidegate.core.notation import parse_counted, parse_range, parse_split


@dataclass(frozen=True)
class Pace:
    count: Annotated[int, Flag("How many.", "N", rule=at_least(1))] = 3
    share: Annotated[float | None, Flag("How much.", rule=SHARE)] = None


@dataclass(frozen=True)
class Target:
    place: str
    gap_s: float = 0.5
    words: list[str] = field(default_factory=list)


TARGET = OptionGroup(
    Target,
    {
        "gap_s": Flag("Pause.", "MS", "--gap-ms", given=float, read=lambda ms: ms / 1000),
        "words": Flag("Words."),
    },
    "Where",
)
seen: list[tuple[Any, ...]] = []


def command(
    context: typer.Context,
    pace: Pace,
    target: Annotated[partial[Target], TARGET],
    place: Annotated[str, Flag("Place.")],
    split: Annotated[tuple[int, int] | None, Flag("P:D.", read=parse_split)] = None,
    as_json: Annotated[bool, Flag("JSON.", name="--json")] = False,
) -> None:
    """Do it."""
    seen.append((pace, target(place), split, as_json, given(context)))


def call(*words: str) -> tuple[Any, ...]:
    app = typer.Typer()
    app.command()(expanded(command))
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return seen.pop()


def test_options_that_are_not_given_leave_the_settings_their_defaults() -> None:
    assert call("--place", "x") == (Pace(), Target("x"), None, False, {"place"})


def test_a_command_gets_objects_made_of_what_was_given() -> None:
    words = (
        "--count",
        "2",
        "--share",
        "1",
        "--gap-ms",
        "250",
        "--words",
        "a",
        "--words",
        "b",
        "--split",
        "1:3",
    )
    pace, target, split, as_json, told = call("--place", "x", "--json", *words)
    assert (pace, target) == (Pace(2, 1.0), Target("x", 0.25, ["a", "b"]))
    assert (split, as_json) == ((1, 3), True)
    assert told == {"place", "json", "count", "share", "gap_ms", "words", "split"}


def test_the_problems_of_all_options_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        call("--place", "x", "--count", "0", "--share", "2", "--split", "3")
    assert caught.value.problems == [
        "--count is at least 1, got 0",
        "--share is a share between 0 and 1, got 2.0",
        "--split 3: expected P:D, prefill and decode instances, each at least 1, as in 1:3",
    ]


@pytest.mark.parametrize("text", ["", "1", "1:", ":1", "0:1", "1:0", "1:2:3", "-1:2", "a:b"])
def test_what_is_no_split_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected P:D"):
        parse_split(text)


@pytest.mark.parametrize(
    ("text", "found"),
    [("a/b:8", ("a/b", 8)), ("a/b", ("a/b", None)), ("roofline:l4/m:2", ("roofline:l4/m", 2)),
     ("roofline:l4/m", ("roofline:l4/m", None)), (" a:0 ", ("a", 0))],
)  # fmt: skip
def test_a_profile_may_have_a_count(text: str, found: tuple[str, int | None]) -> None:
    assert parse_counted(text) == found


def test_a_fleet_has_a_least_and_a_most_size() -> None:
    assert [parse_range(text) for text in ("2..8", "3", " 4..4 ")] == [(2, 8), (3, 3), (4, 4)]
    for text in ("", "0", "0..2", "3..2", "2..", "..2", "2.8", "-1", "2...8"):
        with pytest.raises(ValueError, match=r"expected N instances, or A\.\.B"):
            parse_range(text)
