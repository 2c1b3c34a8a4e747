"""Systems by name, and the checks that refuse one before it serves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from tidegate.core.errors import ConfigError
from tidegate.core.slo import Slo
from tidegate.policies.order import Order, make_order
from tidegate.policies.protocols import StartingRoles
from tidegate.policies.registry import Registry
from tidegate.policies.starting_roles import SplitRoles, even_roles
from tidegate.systems.system import System


@dataclass(frozen=True, slots=True)
class SystemOptions:
    """What a user may set when picking a system.

    ``split`` is (prefill, decode) at start-up, ``tick_s`` the period of pool control (1 s, Narwhal's
    monitoring interval), ``slo`` the target that pool loads are measured against; single requests are
    placed against their own.
    """

    split: tuple[int, int] | None = None
    tick_s: float = 1.0
    slo: Slo = field(default_factory=Slo)

    def __post_init__(self) -> None:
        if not 0 < self.tick_s < float("inf"):
            raise ConfigError(f"tick must be a positive number of seconds, got {self.tick_s}")

    def roles(self) -> StartingRoles:
        """Return the given split, or an even one."""
        return even_roles if self.split is None else SplitRoles(*self.split)


Factory = Callable[[SystemOptions], System]

SYSTEMS: Registry[Factory] = Registry("system", group="tidegate.systems")
"""Factories of systems. A third party names a factory under the entry point group ``tidegate.systems``."""

RENAMED = {"arrow-v2": "arrow"}
"""Names that systems had, and those they have."""


def make_system(
    name: str, *, split: tuple[int, int] | None = None, tick_s: float = 1.0, slo: Slo | None = None
) -> System:
    """Build the system ``name``: that of ``SYSTEMS``, or ``system+order`` with one of ``ORDERS``.

    Raises ConfigError for an unknown name or an impossible option.
    """
    factory, order = named(name)
    system = factory(SystemOptions(split=split, tick_s=tick_s, slo=slo or Slo()))
    return system if order is None else replace(system, name=f"{system.name}+{order.name}", order=order)


def named(name: str) -> tuple[Factory, Order | None]:
    """Look up ``system`` or ``system+order``. Raises ConfigError for an unknown part, listing what exists."""
    base, plus, order = name.partition("+")
    if base in RENAMED and base not in SYSTEMS.names():
        raise ConfigError(f"system {base!r} is now called {RENAMED[base]!r}")
    return SYSTEMS.get(base), make_order(order) if plus else None
