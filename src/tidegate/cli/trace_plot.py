"""Pictures of traces: rate, drift of the input:output ratio, load by phase, lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tidegate.cli.trace_files import Described, Loaded
from tidegate.core.errors import ConfigError
from tidegate.reports.plot_style import plain_log_ticks

SUFFIXES = (".png", ".svg", ".pdf")
RATE_BINS_S = (1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0, 1800.0, 3600.0)
MOST_RATE_POINTS = 150
"""Points of a rate line: finer looks like noise."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A trace with its statistics and its colour."""

    loaded: Loaded
    described: Described
    colour: str

    @property
    def name(self) -> str:
        return Path(self.described.name).name

    @property
    def times_s(self) -> Any:
        """Arrivals, from the first request on."""
        arrival_s = self.loaded.workload.arrival_s
        return arrival_s - arrival_s[0]


def check_plot(path: Path) -> None:
    """Raise ConfigError when the picture cannot be made: unknown suffix, or no matplotlib."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"--plot {path}: the name must end in {', '.join(SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401 - only whether it is there
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'tidegate[plots]'") from None


def plot_traces(path: Path, loaded: Sequence[Loaded], described: Sequence[Described]) -> None:
    """Draw the traces, one colour each, into ``path``; untimed ones appear in the length panels only.

    Raises ConfigError when the file cannot be written.
    """
    from matplotlib.figure import Figure

    curves = [
        Curve(one, about, f"C{k % 10}") for k, (one, about) in enumerate(zip(loaded, described, strict=True))
    ]
    timed = [curve for curve in curves if curve.loaded.timed]
    with_load = [curve for curve in timed if curve.described.load]
    panels = (2 if timed else 0) + (1 if with_load else 0)
    figure = Figure(figsize=(10, 2.4 * panels + 3.2), layout="constrained")
    grid = figure.add_gridspec(panels + 1, 2)
    if timed:
        longest_s = max(float(curve.times_s[-1]) for curve in timed)
        unit_s, unit = _time_unit(longest_s)
        first = figure.add_subplot(grid[0, :])
        rows = [first, *(figure.add_subplot(grid[row, :], sharex=first) for row in range(1, panels))]
        _draw_rates(rows[0], timed, unit_s, longest_s)
        _draw_ratios(rows[1], timed, unit_s)
        if with_load:
            _draw_loads(rows[2], with_load, unit_s)
        for axes in rows:
            axes.tick_params(labelbottom=axes is rows[-1])
        rows[-1].set(xlabel=f"time ({unit})", xlim=(0.0, (longest_s or 1.0) / unit_s))
    for column, what in enumerate(("input", "output")):
        _draw_lengths(figure.add_subplot(grid[panels, column]), curves, what)
    figure.suptitle(curves[0].name if len(curves) == 1 else "", fontsize="medium")
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise ConfigError(f"--plot {path}: cannot write there: {error.strerror}") from None


def _time_unit(duration_s: float) -> tuple[float, str]:
    """Return the unit of a time axis, in seconds and by name."""
    if duration_s > 4 * 3600:
        return 3600.0, "hours"
    return (60.0, "minutes") if duration_s > 300 else (1.0, "seconds")


def _draw_rates(axes: Any, timed: list[Curve], unit_s: float, longest_s: float) -> None:
    bin_s = next((s for s in RATE_BINS_S if longest_s / s <= MOST_RATE_POINTS), RATE_BINS_S[-1])
    for curve in timed:
        # The last bin is cut short by the trace's end and would show a dip.
        bins = max(1, int(curve.times_s[-1] // bin_s))
        counts, edges = np.histogram(curve.times_s, bins=bins, range=(0.0, bins * bin_s))
        axes.stairs(counts / bin_s, edges / unit_s, baseline=None, color=curve.colour, label=curve.name)
    axes.set(ylabel="requests/s", ylim=(0, None), title=f"Rate, by {_span(bin_s)}")
    _finish(axes, legend=len(timed) > 1)


def _draw_ratios(axes: Any, timed: list[Curve], unit_s: float) -> None:
    for curve in timed:
        about = curve.described.statistics
        middles_s = np.array([w.start_s + w.length_s / 2 for w in about.windows])
        ratios = [float("nan") if w.ratio is None else w.ratio for w in about.windows]
        axes.plot(middles_s / unit_s, ratios, ".-", color=curve.colour, ms=4, lw=1)
        axes.axhline(about.ratio, color=curve.colour, lw=0.8, ls=":")
    axes.set_yscale("log")
    plain_log_ticks(axes.yaxis)
    span = _span(timed[0].described.statistics.windows[0].length_s)
    axes.set(ylabel="input : output", title=f"Phase mix, tokens by {span} (dotted: whole trace)")
    _finish(axes, legend=False)


def _draw_loads(axes: Any, curves: list[Curve], unit_s: float) -> None:
    alone = len(curves) == 1
    for curve in curves:
        name = "" if alone else f"{curve.name}: "
        load = curve.described.load
        edges = np.array([w.start_s for w in load] + [load[-1].start_s + load[-1].length_s]) / unit_s
        decode = [float("nan") if w.decode is None else w.decode for w in load]
        second = {"color": "C1"} if alone else {"color": curve.colour, "ls": "--"}
        prefill = [w.prefill for w in load]
        axes.stairs(prefill, edges, baseline=None, lw=1.5, color=curve.colour, label=f"{name}prefill")
        axes.stairs(decode, edges, baseline=None, lw=1.5, label=f"{name}decode", **second)
    title = f"Estimated load on {curves[0].described.profile}"
    axes.set(ylabel="instances", ylim=(0, None), title=title)
    _finish(axes, legend=True)


def _draw_lengths(axes: Any, curves: list[Curve], what: str) -> None:
    for curve in curves:
        tokens = np.sort(curve.loaded.workload.column(f"{what}_tokens"))
        share = np.arange(1, len(tokens) + 1) / len(tokens)
        axes.step(tokens, share, where="post", color=curve.colour, label=curve.name)
    axes.set_xscale("log")
    plain_log_ticks(axes.xaxis)
    title = f"{what.capitalize()} lengths"
    axes.set(xlabel=f"{what} tokens", ylabel="share of requests", ylim=(0, 1.01), title=title)
    _finish(axes, legend=len(curves) > 1 and what == "input")


def _finish(axes: Any, *, legend: bool) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.title.set_fontsize("medium")
    if legend:
        axes.legend(fontsize="small", frameon=False)


def _span(seconds: float) -> str:
    return f"{seconds:g} s" if seconds < 60 else f"{seconds / 60:g} min"
