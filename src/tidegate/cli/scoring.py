"""Options that several verbs share: how a run is scored, and what is printed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tidegate.cli.options import SHARE, Flag
from tidegate.measure.attainment import DEFAULT_LEVEL

SCORING = "Scoring and output"
"""The panel of the help that these options stand in."""


@dataclass(frozen=True, slots=True)
class Scoring:
    """How a run is scored: ``level`` is the share of requests that have to attain their targets."""

    level: Annotated[float, Flag("Attainment that counts as met.", panel=SCORING, rule=SHARE)] = DEFAULT_LEVEL
    require_level: Annotated[bool, Flag("Exit 1 when missed.", panel=SCORING)] = False
    as_json: Annotated[bool, Flag("Print the report as JSON.", name="--json", panel=SCORING)] = False
