"""Length distributions of published traces, by name, for generated workloads.

``presets.json`` holds quantiles of the prompt and answer lengths of each source with its name, commit and
licence, the number of requests behind them, and the rank correlation between the two lengths. Generated
lengths are independent; in all these sources the correlation is below 0.2.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources

from tidegate.core.errors import ConfigError
from tidegate.workloads.token_counts import Quantiles


@dataclass(frozen=True, slots=True)
class Preset:
    """The lengths of one published source; the means are the source's own."""

    name: str
    source: str
    requests: int
    input_mean: float
    output_mean: float
    rank_correlation: float
    inputs: Quantiles
    outputs: Quantiles

    def describe(self) -> str:
        """Return name, means and source in one line."""
        means = f"input mean {self.input_mean:g}, output mean {self.output_mean:g}"
        return f"{self.name}: {means}; quantiles of {self.requests} requests of {self.source}"


def preset_names() -> list[str]:
    """Return the names that ``preset`` accepts."""
    return sorted(_presets())


def preset(name: str) -> Preset:
    """Return the preset of that name; raises ConfigError listing those there are."""
    try:
        return _presets()[name]
    except KeyError:
        raise ConfigError(f"no preset is called {name!r}; there are {', '.join(preset_names())}") from None


@cache
def _presets() -> dict[str, Preset]:
    file = resources.files("tidegate.workloads") / "presets.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    shares = tuple(data["shares"])
    return {
        name: Preset(
            name=name,
            source=entry["source"],
            requests=entry["requests"],
            input_mean=entry["input"]["mean"],
            output_mean=entry["output"]["mean"],
            rank_correlation=entry["rank_correlation"],
            inputs=Quantiles(shares, tuple(entry["input"]["quantiles"])),
            outputs=Quantiles(shares, tuple(entry["output"]["quantiles"])),
        )
        for name, entry in data["presets"].items()
    }
