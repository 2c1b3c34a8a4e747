"""How far a system may size its fleet: a budget in instances or in money, or advice only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from tidegate.cli.options import Flag, Rule, at_least
from tidegate.core.errors import ConfigError

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
