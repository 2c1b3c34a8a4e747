"""What can be deployed: pools of equal replicas, and how a deployment is simulated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from tidegate.core.errors import ConfigError
from tidegate.core.instance import Role
from tidegate.costs.library import PackagedProfile
from tidegate.costs.parallel import SIZES, gpu_name, profiles_on
from tidegate.experiments.setting import Setting, SimulatedFleet
from tidegate.planner.prices import PRICES_PER_H

ORDER = (Role.PREFILL, Role.MIXED, Role.DECODE)
"""Of pools within a deployment."""
ADAPTIVE = ("tidegate",)
"""Systems that settle themselves, while they run, which replicas do what."""
LETTERS = {Role.PREFILL: "P", Role.DECODE: "D", Role.MIXED: "M"}


@dataclass(frozen=True, slots=True)
class Offer:
    """Up to ``count`` GPUs of a kind, each at ``price_per_h`` dollars an hour."""

    gpu: str
    count: int
    price_per_h: float


@dataclass(frozen=True, slots=True)
class ReplicaKind:
    """An instance over ``tp`` GPUs."""

    gpu: str
    tp: int
    profile: PackagedProfile
    price_per_h: float
    """Of the whole instance, in dollars."""

    @property
    def title(self) -> str:
        return f"{self.gpu} TP{self.tp}"


@dataclass(frozen=True, slots=True)
class PoolOf:
    """``count`` equal replicas with one role, whose steps take up to ``chunk_tokens``."""

    role: Role
    kind: ReplicaKind
    count: int
    chunk_tokens: int


@dataclass(frozen=True, slots=True)
class Deployment:
    """Pools under a system's control; made by ``deployment``, which puts them in order."""

    system: str
    pools: tuple[PoolOf, ...]

    @property
    def family(self) -> str:
        """How the phases are shared out: ``disaggregated``, ``colocated`` or ``mixed``; ``adaptive`` where
        all replicas begin as mixed and the system settles it."""
        roles = {pool.role for pool in self.pools}
        if Role.MIXED not in roles:
            return "disaggregated"
        if roles != {Role.MIXED}:
            return "mixed"
        return "adaptive" if self.system in ADAPTIVE else "colocated"

    @property
    def gpus(self) -> Counter[str]:
        """How many GPUs of each kind it takes."""
        counts: Counter[str] = Counter()
        for pool in self.pools:
            counts[pool.kind.gpu] += pool.count * pool.kind.tp
        return counts

    @property
    def instances(self) -> int:
        return sum(pool.count for pool in self.pools)

    @property
    def price_per_h(self) -> float:
        return sum(pool.count * pool.kind.price_per_h for pool in self.pools)

    @property
    def title(self) -> str:
        """The pools in a line, as in ``P 2xTP1/8192 + D 6xTP1``."""
        several = len(self.gpus) > 1
        return " + ".join(
            f"{LETTERS[pool.role]} {pool.count}x{pool.kind.title if several else f'TP{pool.kind.tp}'}"
            + ("" if pool.role is Role.DECODE else f"/{pool.chunk_tokens}")
            for pool in self.pools
        )

    @property
    def label(self) -> str:
        """The title with the system that decides."""
        return f"{self.title}, {self.system}"

    def times(self, factor: int) -> Deployment:
        """Return it with so many times the replicas."""
        return Deployment(self.system, tuple(replace(pool, count=factor * pool.count) for pool in self.pools))

    def part(self, parts: int) -> Deployment:
        """Return one of so many equal parts of it."""
        return Deployment(self.system, tuple(replace(pool, count=pool.count // parts) for pool in self.pools))

    def applied(self, setting: Setting) -> Setting:
        """Return ``setting`` with this deployment's system and fleet."""
        fleet = SimulatedFleet(
            tuple((pool.kind.profile, pool.count) for pool in self.pools),
            setting.fleet.engine,
            chunk_tokens=tuple(pool.chunk_tokens for pool in self.pools),
            labels=tuple(pool.role for pool in self.pools),
        )
        return replace(setting, system=self.system, split=None, fleet=fleet)


def deployment(system: str, pools: Iterable[PoolOf]) -> Deployment:
    """Return the deployment of the pools that are not empty, in order; equal ones become one."""
    counts: Counter[tuple[Role, ReplicaKind, int]] = Counter()
    for pool in pools:
        counts[pool.role, pool.kind, pool.chunk_tokens] += pool.count
    found = [PoolOf(role, kind, count, chunk) for (role, kind, chunk), count in counts.items() if count > 0]
    found.sort(key=lambda pool: (ORDER.index(pool.role), pool.kind.gpu, pool.kind.tp, pool.chunk_tokens))
    return Deployment(system, tuple(found))


def offers(
    gpus: Iterable[tuple[str, int | None]], count: int | None, prices: Mapping[str, float]
) -> tuple[Offer, ...]:
    """Return what there is of each GPU: its own count, or ``count`` for one without.

    ``prices`` are dollars per GPU and hour, over those of ``PRICES_PER_H``. Raises ConfigError for an unknown
    GPU, one named twice, a count that is missing or none, or no price.
    """
    problems: list[str] = []
    found: dict[str, Offer] = {}
    given = {gpu_name(name): price for name, price in prices.items()}
    for text, own in gpus:
        try:
            name = gpu_name(text)
        except ConfigError as error:
            problems += error.problems
            continue
        many = count if own is None else own
        if many is None or many < 1:
            problems.append(f"how many of {name} there are: give --gpus N, or --gpu {text}:N")
        elif name in found:
            problems.append(f"--gpu {name} is given twice")
        else:
            price = given.get(name, PRICES_PER_H.get(name))
            found[name] = Offer(name, many, 0.0 if price is None else price)
            if price is None:
                problems.append(f"no price of {name} is known: give --price {name}=DOLLARS")
    if problems or not found:
        raise ConfigError(problems or ["no GPUs to plan for: give --gpu"])
    return tuple(found.values())


def kinds_on(offered: Iterable[Offer], model: str) -> tuple[ReplicaKind, ...]:
    """Return what an instance of ``model`` can be on the GPUs that are offered.

    Raises ConfigError where no instance fits, saying how many GPUs the smallest would take.
    """
    kinds: list[ReplicaKind] = []
    problems: list[str] = []
    for offer in offered:
        try:
            on = profiles_on(offer.gpu, model)
        except ConfigError as error:
            problems += error.problems
            continue
        fitting = [tp for tp in SIZES if tp in on and tp <= offer.count]
        if not fitting:
            problems.append(
                f"the budget binds: {model} takes at least {min(on)} x {offer.gpu}, and there "
                f"{'is' if offer.count == 1 else 'are'} {offer.count}"
            )
        kinds += [ReplicaKind(offer.gpu, tp, on[tp], tp * offer.price_per_h) for tp in fitting]
    if not kinds:
        raise ConfigError(problems)
    return tuple(kinds)
