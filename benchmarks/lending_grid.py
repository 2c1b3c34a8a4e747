"""Constants of ``arrow-lending`` to choose from: its own first, then each limit changed on its own.

Run: ``tidegate compare --suite traces --quick --choose benchmarks/lending_grid.py --out DIR``. On every
workload the constants are those that do best on all others (docs/suites.md).
"""

from __future__ import annotations

from dataclasses import replace

from tidegate.policies.arrow.lending import LendingLimits, LendingMonitor, LendingPlacement
from tidegate.policies.arrow.repair import RepairingMonitor, RepairingPlacement
from tidegate.systems import System, SystemOptions, make_system


def own(options: SystemOptions) -> System:
    """The constants that it has."""
    return _lending(options, LendingLimits())


def keeps_decode(options: SystemOptions) -> System:
    """A decode pool lends sooner."""
    return _lending(options, LendingLimits(decode_full=0.75))


def short_wait(options: SystemOptions) -> System:
    """A prefill pool lends only with hardly a queue."""
    return _lending(options, LendingLimits(wait=0.1))


def long_wait(options: SystemOptions) -> System:
    """A prefill pool lends with half the target in its queue."""
    return _lending(options, LendingLimits(wait=0.5))


def small_reserve(options: SystemOptions) -> System:
    """Little KV is kept for growth."""
    return _lending(options, LendingLimits(kv_reserve=0.05))


def needy(options: SystemOptions) -> System:
    """A decode pool borrows sooner."""
    return _lending(options, LendingLimits(needy=0.6))


def _lending(options: SystemOptions, limits: LendingLimits) -> System:
    made = make_system("arrow-lending", slo=options.slo, split=options.split, tick_s=options.tick_s)
    both = RepairingPlacement(LendingPlacement(slo=options.slo, limits=limits))
    monitor = LendingMonitor(slo=options.slo, limits=limits, period_s=options.tick_s)
    return replace(made, prefill=both, decode=both, controllers=(RepairingMonitor(monitor),))
