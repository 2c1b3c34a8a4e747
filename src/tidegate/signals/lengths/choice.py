"""Sources of length predictions by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tidegate.core.errors import ConfigError
from tidegate.signals.lengths.known import MaxTokensLengths, OracleLengths
from tidegate.signals.lengths.source import LengthSource

SERVED: dict[str, Callable[[], LengthSource]] = {"max-tokens": MaxTokensLengths}
"""The sources that need nothing but what a control plane hears."""
SIMULATED = ("oracle", *SERVED)
"""The sources of a simulation."""


def served_source(name: str) -> LengthSource:
    """Return a new source. Raises ConfigError for an unknown name."""
    make = SERVED.get(name)
    if make is None:
        raise ConfigError(f"no source of lengths is called {name!r}; there are: {', '.join(SERVED)}")
    return make()


def simulated_source(name: str, output_tokens: Mapping[str, int]) -> LengthSource:
    """Return a new source for a simulation, which knows the answers' lengths by the requests' ids.

    Raises ConfigError for an unknown name.
    """
    if name == OracleLengths.name:
        return OracleLengths(output_tokens)
    if name not in SERVED:
        raise ConfigError(f"no source of lengths is called {name!r}; there are: {', '.join(SIMULATED)}")
    return served_source(name)
