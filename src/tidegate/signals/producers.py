"""Producers of signals, and the check that a system's needs are met."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from tidegate.core.errors import ConfigError
from tidegate.policies.protocols import Signal
from tidegate.systems.system import System


class Producer(Protocol):
    """A part of the deployment that gives a signal."""

    @property
    def gives(self) -> Signal:
        """The signal."""
        ...


@dataclass(frozen=True, slots=True)
class Profiles:
    """Gives PROFILE: every instance has a measured or packaged profile."""

    gives: Signal = Signal.PROFILE


def check_signals(system: System, producers: Iterable[Producer]) -> None:
    """Raise ConfigError when ``system`` needs a signal that no producer of this deployment gives."""
    given = {producer.gives for producer in producers}
    missing = sorted(system.needs - given)
    if missing:
        have = ", ".join(sorted(given)) or "none"
        raise ConfigError(
            f"system {system.name!r} needs the signals {', '.join(missing)}; this deployment has: {have}"
        )
