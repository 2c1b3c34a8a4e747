"""The names of ``compare --systems``: a system, or the best of several candidates in hindsight."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from tidegate.core.defaults import DEFAULT_SYSTEM
from tidegate.core.errors import ConfigError
from tidegate.core.instance import Role
from tidegate.core.notation import FleetRange, parse_split
from tidegate.experiments.setting import Setting
from tidegate.policies.chunks import CHUNKS, FIXED
from tidegate.policies.starting_roles import even_roles
from tidegate.systems import make_system, split_order

CHUNKS_TOKENS = (512, 1024, 2048, 4096, 8192)
"""Token budgets of a step that ``NAME:tuned`` chooses from."""
SUITES = {
    "default": f"{DEFAULT_SYSTEM},arrow-lending,static:even,"
    "static:best+feasible-sjf,colocated:tuned+feasible-sjf",
    "ordered": f"{DEFAULT_SYSTEM},arrow-lending,arrow-lending+feasible-sjf,static:best,"
    "static:best+feasible-sjf,colocated:tuned,colocated:tuned+feasible-sjf",
    "orders": ",".join(
        f"{DEFAULT_SYSTEM}+{order}" for order in ("fifo", "edf", "sjf", "feasible-first", "feasible-sjf")
    ),
    "splits": f"{DEFAULT_SYSTEM},static:all",
}
"""Named sets of systems. In ``default`` what is found in hindsight has the default system's order, so that
this is no advantage of it."""
MOST_SPLITS = 16
"""Splits that ``NAME:best`` chooses from: all of a small fleet, and of a large one as many at equal steps."""
FORMS = "NAME[+ORDER], NAME:even, NAME:P:D, NAME:best, NAME:all, NAME:tuned, NAME:CHUNK, NAME:slack"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A system with one choice of its options; ``label`` names the choice, empty where there was none."""

    system: str
    split: tuple[int, int] | None = None
    chunk_tokens: int | None = None
    chunks: str | None = None
    label: str = ""

    def applied(self, setting: Setting) -> Setting:
        """Return ``setting`` with this candidate's system and options.

        Where it has bounds, the candidate's fleet begins with the least, or with its split's instances.
        """
        fleet, chunks = setting.fleet, self.chunks or setting.chunks
        if self.chunk_tokens is not None:
            chunks = FIXED.name
            fleet = replace(fleet, engine=replace(fleet.engine, max_batch_tokens=self.chunk_tokens))
        setting = replace(setting, system=self.system, split=self.split, fleet=fleet, chunks=chunks)
        if setting.bounds is None:
            return setting
        spares = FleetRange(*setting.bounds).spares(self.split)
        return replace(setting, settings=replace(setting.settings, spares=spares))


@dataclass(frozen=True, slots=True)
class Contender:
    """A row of a comparison: the best of its candidates counts."""

    name: str
    candidates: tuple[Candidate, ...]


def suite(name: str) -> list[str]:
    """Return the systems of ``SUITES[name]``. Raises ConfigError for an unknown name."""
    if name not in SUITES:
        raise ConfigError(f"no suite is called {name!r}; there is {', '.join(SUITES)}")
    return SUITES[name].split(",")


def contenders(names: Iterable[str], instances: int, least: int | None = None) -> list[Contender]:
    """Return the contenders that ``names`` ask for on a fleet of ``instances``, each once.

    Where the fleet is of ``least`` to ``instances``, a split may be of as many as that; those that are chosen
    from are of all.

    ``static:best`` is the best static split in hindsight, ``static:all`` every split as a row of its own,
    ``colocated:tuned`` the best of ``CHUNKS_TOKENS``, ``colocated:slack`` one with that chunk budget; any
    system may be named instead, with ``+ORDER`` at the
    end. Raises ConfigError, with all problems at once.
    """
    problems: list[str] = []
    found: dict[str, Contender] = {}
    for name in names:
        try:
            for each in _expand(name.strip(), FleetRange(least or instances, instances)):
                found.setdefault(each.name, each)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    if not found:
        raise ConfigError(f"no systems to compare; give --systems with some of {FORMS}")
    return list(found.values())


def any_order(contender: Contender, orders: Iterable[str]) -> Contender:
    """Return the contender with its candidates under each of ``orders`` as well, "" being their own.

    One whose name has an order already keeps it.
    """
    if split_order(contender.name)[1] is not None:
        return contender
    more = (
        replace(each, system=f"{each.system}+{order}", label=f"{each.label}, {order}".lstrip(", "))
        if order
        else each
        for order in orders
        for each in contender.candidates
    )
    return replace(contender, candidates=tuple(more))


def _expand(name: str, fleet: FleetRange) -> list[Contender]:
    instances = fleet.most
    file, suffix, rest = name.rpartition(".py:")
    base, order = split_order(rest)
    system, colon, choice = base.partition(":")
    system, ordered = file + suffix + system, "" if order is None else f"+{order}"
    full = system + ordered
    if choice == "all":
        names = [f"{system}:{p}:{d}{ordered}" for p, d in splits(instances)]
        return [row for each in names for row in _expand(each, fleet)]
    if not colon:
        made = [Candidate(full)]
    elif choice == "best":
        every = splits(instances)
        step = -(-len(every) // MOST_SPLITS)
        made = [Candidate(full, (p, d), label=f"split {p}:{d}") for p, d in every[step - 1 :: step]]
    elif choice == "tuned":
        made = [Candidate(full, chunk_tokens=chunk, label=f"chunk {chunk}") for chunk in CHUNKS_TOKENS]
    elif choice in CHUNKS.names():
        made = [Candidate(full, chunks=choice)]
    elif choice == "even":
        made = [Candidate(full, even_split(instances))]
    elif choice.isdecimal() and int(choice):
        made = [Candidate(full, chunk_tokens=int(choice))]
    else:
        try:
            made = [Candidate(full, parse_split(choice))]
        except ValueError:
            raise ConfigError(f"system {name!r}: unknown choice {choice!r}; there is {FORMS}") from None
    for each in made:
        # Raises ConfigError when the system is unknown or cannot take the split.
        bounds = None if fleet.ceiling is None else (fleet.least, fleet.most)
        first = instances if bounds is None else instances - fleet.spares(each.split)
        make_system(each.system, split=each.split, fleet=bounds).roles(first)
    return [Contender(name, tuple(made))]


def splits(instances: int) -> list[tuple[int, int]]:
    """Return every (prefill, decode) split. Raises ConfigError for fewer than two instances."""
    if instances < 2:
        raise ConfigError(
            "a static split takes at least two instances; with one, name systems without, as in "
            f"--systems {DEFAULT_SYSTEM},colocated:tuned"
        )
    return [(prefill, instances - prefill) for prefill in range(1, instances)]


def even_split(instances: int) -> tuple[int, int]:
    """Return the split that systems start with unless told otherwise."""
    splits(instances)
    prefill = even_roles(instances).count(Role.PREFILL)
    return prefill, instances - prefill
