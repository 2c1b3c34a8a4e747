"""Targets: reading, showing and judging them."""

from __future__ import annotations

import math

import pytest

from tidegate.core.errors import ConfigError
from tidegate.core.slo import Slo


@pytest.mark.parametrize("text", ["ttft:500,tpot:50", "tpot:50 ttft:500", " ttft:500 , tpot:50 "])
def test_parse_accepts_either_order_and_separator(text: str) -> None:
    assert Slo.parse(text) == Slo(0.5, 0.05)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ttft:500",
        "ttft:500,ttft:500",
        "ttft:500,tpot:x",
        "ttft=500,tpot:5",
        "ttft:0,tpot:5",
        "e2e:1,tpot:5",
    ],
)
def test_parse_refuses(text: str) -> None:
    with pytest.raises(ConfigError):
        Slo.parse(text)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_targets_are_positive_and_finite(bad: float) -> None:
    with pytest.raises(ConfigError):
        Slo(ttft_s=bad)
    with pytest.raises(ConfigError):
        Slo(tpot_s=bad)


def test_shown_text_parses_back() -> None:
    slo = Slo(0.25, 0.0375)
    assert Slo.parse(str(slo)) == slo


def test_both_targets_must_hold_and_one_token_has_no_tpot() -> None:
    slo = Slo(1.0, 0.05)
    assert slo.attained(1.0, 0.05)
    assert not slo.attained(1.01, 0.01)
    assert not slo.attained(0.1, 0.06)
    assert slo.attained(1.0, None)
