"""How far a system may size its fleet: a budget in instances or in money, or advice only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field

from tidegate.cli.options import Flag, OptionGroup, Rule, at_least
from tidegate.cli.sections import Section
from tidegate.cli.setting_types import Amount, Count
from tidegate.core.errors import ConfigError
from tidegate.core.notation import FleetRange

POSITIVE = Rule(lambda amount: 0 < amount < float("inf"), "a positive amount")


@dataclass(frozen=True, slots=True)
class Scaling:
    """What bounds a fleet between the least and the most instances that there are."""

    panel: ClassVar[str] = "Scaling"

    budget: Annotated[
        int | None,
        Flag("Instances that a system that sizes its fleet may run at most.", "N", rule=at_least(1)),
    ] = None
    budget_per_hour: Annotated[
        float | None,
        Flag("What they may cost per hour at most, by --price.", "$", rule=POSITIVE, needs=("price",)),
    ] = None
    price: Annotated[float | None, Flag("What an instance costs per hour.", "$", rule=POSITIVE)] = None
    advise: Annotated[bool, Flag("Only say what would be done to the fleet.")] = False

    def bounds(self, least: int, most: int) -> tuple[int, int]:
        """Return the least and the most instances within the budget.

        Raises ConfigError for a budget below the least, and for one in money without a price.
        """
        budgets = [] if self.budget is None else [(self.budget, f"--budget {self.budget}")]
        if self.budget_per_hour is not None:
            if self.price is None:
                raise ConfigError("--budget-per-hour needs --price, what an instance costs per hour")
            affordable = int(self.budget_per_hour / self.price + 1e-9)
            budgets.append((affordable, f"--budget-per-hour {self.budget_per_hour:g}"))
        for budget, words in budgets:
            if budget < least:
                raise ConfigError(f"{words} allows {budget} instances, and the fleet has at least {least}")
            most = min(most, budget)
        return least, most


def _shared(name: str, default: Any = None) -> Any:
    """Return the field of a setting that has the flag of ``Scaling``."""
    field = Field(default)
    field.metadata.append(OptionGroup(Scaling).flags[name])
    return field


class ScalingSection(Section):
    """How far the system may size the fleet, of a gateway."""

    panel = Scaling.panel

    budget: Count | None = _shared("budget")
    budget_per_hour: Amount | None = _shared("budget_per_hour")
    price: Amount | None = _shared("price")
    advise: bool = _shared("advise", False)

    def bounds(self, fleet: FleetRange) -> tuple[int, int] | None:
        """Return the least and the most instances that the system may have; None where their number is fixed.

        Raises ConfigError as ``Scaling.bounds`` does.
        """
        if fleet.ceiling is None and self.budget is None and self.budget_per_hour is None:
            return None
        scaling = Scaling(self.budget, self.budget_per_hour, self.price, self.advise)
        return scaling.bounds(fleet.least, fleet.most)
