"""Named compositions of policies: what a user picks with ``--system``."""

from tidegate.systems import ares as ares
from tidegate.systems import builtin as builtin
from tidegate.systems import dopd as dopd
from tidegate.systems import rounds as rounds
from tidegate.systems import tidegate as tidegate
from tidegate.systems.registry import SYSTEMS, SystemOptions, make_system, named, split_order, systems_in
from tidegate.systems.system import System

__all__ = ["SYSTEMS", "System", "SystemOptions", "make_system", "named", "split_order", "systems_in"]
