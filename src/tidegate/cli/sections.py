"""What the sections of the settings of ``tidegate serve`` are made of."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from tidegate.cli.options import Flag


def setting(
    default: Any,
    text: str,
    metavar: str | None = None,
    *,
    name: str = "",
    panel: str | None = None,
    shown: bool | str = True,
    needs: tuple[str, ...] = (),
    **checks: Any,
) -> Any:
    """Return the field of a setting that has a flag; ``checks`` are those of pydantic's ``Field``."""
    field = Field(default, **checks)
    field.metadata.append(Flag(text, metavar, name, panel, shown, needs=needs))
    return field


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    panel: ClassVar[str] = ""
    """Where the help shows the section's flags."""
