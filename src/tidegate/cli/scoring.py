"""The options of the verbs that score a run, ``bench`` and ``report``."""

from __future__ import annotations

from typing import Annotated

import typer

from tidegate.core.errors import ConfigError

SCORING = "Scoring and output"
"""The panel of the help that these options stand in."""


def _share(level: float) -> float:
    if not 0 < level <= 1:
        raise ConfigError(f"--level is a share between 0 and 1, got {level}")
    return level


Level = Annotated[
    float, typer.Option(help="Attainment that counts as met.", callback=_share, rich_help_panel=SCORING)
]
RequireLevel = Annotated[
    bool, typer.Option("--require-level", help="Exit 1 when missed.", rich_help_panel=SCORING)
]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON.", rich_help_panel=SCORING)]
