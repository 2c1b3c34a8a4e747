"""Sources of length predictions by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from tidegate.core.errors import ConfigError
from tidegate.signals.lengths.errors import packaged_errors
from tidegate.signals.lengths.hidden import HiddenLengths
from tidegate.signals.lengths.histogram import HistogramLengths
from tidegate.signals.lengths.known import MaxTokensLengths, OracleLengths
from tidegate.signals.lengths.simulated import SimulatedHidden
from tidegate.signals.lengths.source import LengthSource

SERVED: dict[str, Callable[[], LengthSource]] = {
    "hidden": HiddenLengths,
    "histogram": HistogramLengths,
    "max-tokens": MaxTokensLengths,
}
"""The sources that need nothing but what a control plane hears."""
SIMULATED = ("hidden", "histogram", "max-tokens", "oracle")
"""The sources of a simulation."""
DEFAULT = "hidden"
"""What engines report, and the histogram where they report nothing."""
AUTO = "auto"
"""DEFAULT for a system that needs lengths, else none: a third of what a request costs the gateway."""


def served_source(name: str) -> LengthSource:
    """Return a new source. Raises ConfigError for an unknown name."""
    return SERVED[checked(name, SERVED)]()


def deployed_source(name: str, *, needed: bool) -> LengthSource | None:
    """Return a new source for a gateway; ``name`` may be AUTO. Raises ConfigError for an unknown name."""
    if name == AUTO:
        return served_source(DEFAULT) if needed else None
    return served_source(name)


def simulated_source(name: str, output_tokens: Mapping[str, int]) -> LengthSource:
    """Return a new source for a simulation, which knows the answers' lengths by the requests' ids.

    Raises ConfigError for an unknown name.
    """
    if checked(name, SIMULATED) == "oracle":
        return OracleLengths(output_tokens)
    if name == "hidden":
        return SimulatedHidden(output_tokens, packaged_errors())
    return served_source(name)


def checked(name: str, names: Collection[str]) -> str:
    """Return the name. Raises ConfigError for one that is not among ``names``."""
    if name not in names:
        raise ConfigError(f"no source of lengths is called {name!r}; there are: {', '.join(names)}")
    return name
