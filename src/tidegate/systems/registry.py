"""Systems by name, and the checks that refuse one before it serves."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import module_from_spec, spec_from_file_location
from inspect import isfunction
from pathlib import Path
from types import ModuleType
from typing import TypedDict, Unpack

from tidegate.core.errors import ConfigError
from tidegate.core.slo import Slo
from tidegate.policies.chunks import make_chunks
from tidegate.policies.order import Order
from tidegate.policies.orders import make_order
from tidegate.policies.protocols import AnswerLengths, StartingRoles
from tidegate.policies.registry import Registry
from tidegate.policies.starting_roles import SplitRoles, even_roles
from tidegate.systems.system import System


@dataclass(frozen=True, slots=True)
class SystemOptions:
    """What a user may set when picking a system.

    ``split`` is (prefill, decode) at start-up, ``tick_s`` the period of pool control (1 s, Narwhal's
    monitoring interval), ``slo`` the target that pool loads are measured against; single requests are
    placed against their own. ``fleet`` is the least and the most instances between which a system may add and
    remove some, None where it has those that there are; ``start_delay_s`` is what a prefill and a decode
    instance take to start. With ``advise`` a controller that sizes the fleet only says what it would do.
    ``answered`` are requests of an earlier run, the oldest first, from whose lengths a system may begin;
    None: it is to begin without.
    """

    split: tuple[int, int] | None = None
    tick_s: float = 1.0
    slo: Slo = field(default_factory=Slo)
    fleet: tuple[int, int] | None = None
    start_delay_s: tuple[float, float] = (30.0, 45.0)
    advise: bool = False
    answered: Sequence[AnswerLengths] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.tick_s < float("inf"):
            raise ConfigError(f"tick must be a positive number of seconds, got {self.tick_s}")

    def roles(self) -> StartingRoles:
        """Return the given split, or an even one."""
        return even_roles if self.split is None else SplitRoles(*self.split)


class GivenOptions(TypedDict, total=False):
    """The options of ``SystemOptions`` beside ``slo``."""

    split: tuple[int, int] | None
    tick_s: float
    fleet: tuple[int, int] | None
    start_delay_s: tuple[float, float]
    advise: bool
    answered: Sequence[AnswerLengths] | None


Factory = Callable[[SystemOptions], System]

SYSTEMS: Registry[Factory] = Registry("system", group="tidegate.systems")
"""Factories of systems. A third party names a factory under the entry point group ``tidegate.systems``."""

RENAMED = {"arrow-v2": "arrow"}
"""Names that systems had, and those they have."""


def make_system(
    name: str, *, slo: Slo | None = None, chunks: str | None = None, **options: Unpack[GivenOptions]
) -> System:
    """Build the system ``name``: that of ``SYSTEMS``, or ``system+order`` with one of ``ORDERS``.

    ``chunks`` names its chunk budget, one of ``CHUNKS``; None: its own. ``options`` are those of
    ``SystemOptions``. Raises ConfigError for an unknown name or an impossible
    option.
    """
    factory, order = named(name)
    system = factory(SystemOptions(slo=slo or Slo(), **options))
    if options.get("answered") is not None and not system.observers:
        raise ConfigError(f"system {name!r} follows no lengths: it has nothing to begin with earlier ones")
    if chunks is not None:
        system = replace(system, chunks=make_chunks(chunks))
    return system if order is None else system.ordered(order, f"{system.name}+{order.name}")


def split_order(name: str) -> tuple[str, str | None]:
    """Part ``system+order``, where the system may have a choice (``:best``); None where no order is named.

    The name of a system may hold a plus itself.
    """
    base, plus, order = name.rpartition("+")
    if not plus or f"{base}+{order.partition(':')[0]}" in SYSTEMS.names():
        return name, None
    return base, order


def named(name: str) -> tuple[Factory, Order | None]:
    """Look up ``system`` or ``system+order``; ``FILE.py:NAME`` is the factory NAME of a Python file.

    The file runs. Raises ConfigError for an unknown part, listing what exists, and for a file that does not
    load.
    """
    file, suffix, rest = name.rpartition(".py:")
    base, order = split_order(rest)
    if suffix:
        factory = _from_file(Path(file + ".py"), base)
    elif base in RENAMED and base not in SYSTEMS.names():
        raise ConfigError(f"system {base!r} is now called {RENAMED[base]!r}")
    elif ":" in base:
        system, _, choice = base.partition(":")
        raise ConfigError(
            f"{name!r}: only `tidegate compare` takes {':' + choice!r}, a choice among several runs; give "
            f"{system!r}, with --split P:D for another split than even"
        )
    else:
        factory = SYSTEMS.get(base)
    return factory, make_order(order) if order is not None else None


def _from_file(path: Path, name: str) -> Factory:
    module = _module_of(path)
    factory: Factory | None = vars(module).get(name)
    if not callable(factory):
        functions = sorted(name for name, each in vars(module).items() if isfunction(each))
        raise ConfigError(f"{path} has no function {name!r}; it has: {', '.join(functions) or 'none'}")
    return factory


def systems_in(path: Path) -> list[str]:
    """Return the factories that a Python file defines, as ``named`` takes them, in its order.

    Those whose name begins with an underscore are none. The file runs. Raises ConfigError for one that does
    not load or is not called ``.py``, and for one without any.
    """
    if path.suffix != ".py":
        raise ConfigError(f"{path} is no Python file: its name has to end in .py")
    module = _module_of(path)
    names = [
        name
        for name, each in vars(module).items()
        if isfunction(each) and each.__module__ == module.__name__ and not name.startswith("_")
    ]
    if not names:
        raise ConfigError(f"{path} has no function of its own that makes a system")
    return [f"{path}:{name}" for name in names]


def _module_of(path: Path) -> ModuleType:
    """Run the file as a module of its own name, once as long as it does not change."""
    try:
        name = f"{path.resolve()}@{path.stat().st_mtime_ns}"
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    if name in sys.modules:
        return sys.modules[name]
    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    # dataclasses look their module up while it runs.
    module = sys.modules[name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        frames = [each for each in traceback.extract_tb(error.__traceback__) if Path(each.filename) == path]
        line = frames[-1].lineno if frames else getattr(error, "lineno", None)
        raise ConfigError(f"{path}, line {line}: {type(error).__name__}: {error}") from error
    return module
