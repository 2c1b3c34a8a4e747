"""A row of a suite as data: a workload on a fleet, and the systems that are compared there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from tidegate.core.errors import ConfigError
from tidegate.core.slo import Slo
from tidegate.costs.forms import TransferCost
from tidegate.costs.library import PackagedProfile
from tidegate.dataplane.replica import EngineSettings
from tidegate.experiments.setting import Setting, SimulatedFleet
from tidegate.experiments.systems import Contender, any_order, contenders
from tidegate.sim import SimSettings
from tidegate.systems import split_order
from tidegate.systems.registry import SYSTEMS
from tidegate.workloads.choice import WorkloadChoice

ORDERS = ("", "sjf", "feasible-first", "feasible-sjf")
"""Orders of waiting prompts that every system of a row is offered, its own first."""
OWN_ORDER = ("",)


@dataclass(frozen=True, slots=True)
class World:
    """What passes beside the model: host time per step, HTTP and tokenisation per leg, and what links carry.

    ``link_bytes_per_s`` None leaves the profile's.
    """

    name: str
    host_s: float = 0.0
    front_s: float = 0.0
    link_bytes_per_s: float | None = None


IDEAL = World("ideal")
HOST = World("host", 0.001, 0.015)
LINKS = World("links", 0.001, 0.015, 20e9)
WORLDS = (IDEAL, HOST, LINKS)
"""Those that every headline is reported in."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A figure of a paper, and what is measured beside it: a system's ``measure`` over that of ``against``.

    ``measure`` is "goodput", or a figure of the runs at ``factor`` times the goodput of ``against``:
    "attainment", or as in "ttft p90". ``paper`` is the ratio that the paper has. Without ``against`` it is
    the figure itself, at the workload's own rate.
    """

    says: str
    paper: float
    measure: str
    systems: tuple[str, ...]
    against: str
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Experiment:
    """An experiment of a suite.

    Rows with one ``workload`` have the same traffic, whatever the fleet. ``systems`` are contenders as
    ``compare --systems`` takes them, the subject of the suite first. ``link_share`` is what is left of the
    links' bandwidth. The last ``spares`` instances are not up at the start. Without systems a row is only its
    claims. ``quick`` rows stand for the suite where time is short.
    """

    workload: str
    choice: WorkloadChoice
    profile: PackagedProfile
    instances: int
    slo: Slo
    systems: tuple[str, ...]
    world: World = IDEAL
    variant: str = ""
    orders: tuple[str, ...] = ORDERS
    closed_loop: bool = False
    link_share: float = 1.0
    slowed: Mapping[str, float] = field(default_factory=dict)
    deaths: Sequence[tuple[float, str]] = ()
    returns: Sequence[tuple[float, str]] = ()
    spares: int = 0
    claims: tuple[Claim, ...] = ()
    quick: bool = False

    @property
    def fleet(self) -> str:
        """The fleet in short: ``8xh100_sxm/llama-3.1-8b``."""
        return f"{self.instances}x{self.profile.name}"

    @property
    def name(self) -> str:
        """The name that no other row of the suite has: workload, fleet, world and variant."""
        parts = (self.workload, self.fleet.replace("/", "-"), self.world.name, self.variant)
        return "/".join(part for part in parts if part)

    def setting(self) -> Setting:
        """Return the row as a setting without a system."""
        packaged, carries = self.profile, self.world.link_bytes_per_s
        if carries is not None or self.link_share != 1.0:

            def link(cost: TransferCost) -> TransferCost:
                least = float(cost.bytes_per_s) if carries is None else min(carries, float(cost.bytes_per_s))
                return replace(cost, bytes_per_s=self.link_share * least)

            inside = link(packaged.profile.transfer)
            packaged = replace(
                packaged,
                profile=replace(packaged.profile, transfer=inside),
                inter_node=link(packaged.inter_node),
            )
        settings = SimSettings(
            slo=self.slo,
            front_s=self.world.front_s,
            closed_loop=self.closed_loop,
            slowed=self.slowed,
            deaths=self.deaths,
            returns=self.returns,
            spares=self.spares,
        )
        engine = EngineSettings(host_s=self.world.host_s)
        return Setting(self.choice, SimulatedFleet(((packaged, self.instances),), engine), "", None, settings)

    def contenders(self) -> list[Contender]:
        """Return the systems that exist, each with the best of its candidates to come."""
        there, _ = known(self.systems)
        if not self.systems:
            return []
        return [any_order(each, self.orders) for each in contenders(there, self.instances)]


def known(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Part names of contenders into those whose system is there, and those where it is not."""
    there: list[str] = []
    missing: list[str] = []
    registered = SYSTEMS.names()
    for name in names:
        base = name if ".py:" in name else split_order(name)[0].partition(":")[0]
        (there if ".py:" in name or base in registered else missing).append(name)
    return there, missing


def chosen(rows: Sequence[Experiment], patterns: str) -> list[Experiment]:
    """Return the rows whose names match one of ``patterns``: shell patterns, or parts of a name.

    Raises ConfigError for a pattern that no row matches, with the rows that there are.
    """
    wanted = [pattern.strip() for pattern in patterns.split(",") if pattern.strip()]
    if not wanted:
        return list(rows)

    def matches(pattern: str) -> Callable[[Experiment], bool]:
        return lambda row: fnmatchcase(
            row.name, pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
        )

    lost = [pattern for pattern in wanted if not any(map(matches(pattern), rows))]
    if lost:
        names = ", ".join(row.name for row in rows)
        raise ConfigError([f"no row matches {pattern!r}; there is {names}" for pattern in lost])
    return [row for row in rows if any(matches(pattern)(row) for pattern in wanted)]
