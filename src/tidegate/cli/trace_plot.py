"""Pictures of traces: rate, drift of the input:output ratio, load by phase, lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tidegate.cli.trace_files import Described, Loaded
from tidegate.core.errors import ConfigError

SUFFIXES = (".png", ".svg", ".pdf")
MOST_RATE_POINTS = 150
"""Points of a rate line: finer looks like noise."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A trace with its figures and its colour."""

    one: Loaded
    about: Described
    colour: str

    @property
    def name(self) -> str:
        return Path(self.about.name).name

    @property
    def duration_s(self) -> float:
        times_s = self.one.workload.arrival_s
        return float(times_s[-1] - times_s[0])


@dataclass(frozen=True, slots=True)
class TimeUnit:
    """The unit of a time axis."""

    unit_s: float
    unit: str

    @classmethod
    def over(cls, duration_s: float) -> TimeUnit:
        """Choose the unit for a length of time."""
        if duration_s > 4 * 3600:
            return cls(3600.0, "hours")
        return cls(60.0, "minutes") if duration_s > 300 else cls(1.0, "seconds")


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
    timed = [curve for curve in curves if curve.one.timed]
    with_load = [curve for curve in timed if curve.about.load]
    panels = (2 if timed else 0) + (1 if with_load else 0)
    figure = Figure(figsize=(10, 2.4 * panels + 3.2), layout="constrained")
    grid = figure.add_gridspec(panels + 1, 2)
    if timed:
        _over_time(figure, [grid[row, :] for row in range(panels)], timed, with_load)
    for column, what in enumerate(("input", "output")):
        _lengths(figure.add_subplot(grid[panels, column]), curves, what)
    names = ", ".join(curve.name for curve in curves)
    figure.suptitle(names if len(curves) == 1 else "", fontsize="medium")
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise ConfigError(f"--plot {path}: cannot write there: {error.strerror}") from None


def _over_time(figure: Any, places: list[Any], timed: list[Curve], with_load: list[Curve]) -> None:
    longest_s = max(curve.duration_s for curve in timed)
    clock = TimeUnit.over(longest_s)
    rate = figure.add_subplot(places[0])
    ratio = figure.add_subplot(places[1], sharex=rate)
    _rates(rate, timed, clock, _bin(longest_s))
    _ratios(ratio, timed, clock)
    last = ratio
    if with_load:
        last = figure.add_subplot(places[2], sharex=rate)
        _loads(last, with_load, clock)
    for axes in (rate, ratio, last):
        axes.tick_params(labelbottom=axes is last)
    last.set(xlabel=f"time ({clock.unit})", xlim=(0.0, (longest_s or 1.0) / clock.unit_s))


def _rates(axes: Any, timed: list[Curve], clock: TimeUnit, bin_s: float) -> None:
    for curve in timed:
        times_s = curve.one.workload.arrival_s - curve.one.workload.arrival_s[0]
        # The last bin is cut short by the trace's end and would show a dip.
        bins = max(1, int(times_s[-1] // bin_s))
        counts, edges = np.histogram(times_s, bins=bins, range=(0.0, bins * bin_s))
        axes.stairs(counts / bin_s, edges / clock.unit_s, baseline=None, color=curve.colour, label=curve.name)
    axes.set(ylabel="requests/s", ylim=(0, None), title=f"Rate, by {_span(bin_s)}")
    _finish(axes, legend=len(timed) > 1)


def _ratios(axes: Any, timed: list[Curve], clock: TimeUnit) -> None:
    for curve in timed:
        about = curve.about.statistics
        middles_s = np.array([w.start_s + w.length_s / 2 for w in about.windows])
        ratios = [float("nan") if w.ratio is None else w.ratio for w in about.windows]
        axes.plot(middles_s / clock.unit_s, ratios, ".-", color=curve.colour, ms=4, lw=1)
        axes.axhline(about.ratio, color=curve.colour, lw=0.8, ls=":")
    axes.set_yscale("log")
    _plain_log(axes.yaxis)
    span = _span(timed[0].about.statistics.windows[0].length_s)
    axes.set(ylabel="input : output", title=f"Phase mix, tokens by {span} (dotted: whole trace)")
    _finish(axes, legend=False)


def _loads(axes: Any, curves: list[Curve], clock: TimeUnit) -> None:
    alone = len(curves) == 1
    for curve in curves:
        name = "" if alone else f"{curve.name}: "
        load = curve.about.load
        edges = np.array([w.start_s for w in load] + [load[-1].start_s + load[-1].length_s]) / clock.unit_s
        decode = [float("nan") if w.decode is None else w.decode for w in load]
        second = {"color": "C1"} if alone else {"color": curve.colour, "ls": "--"}
        prefill = [w.prefill for w in load]
        axes.stairs(prefill, edges, baseline=None, lw=1.5, color=curve.colour, label=f"{name}prefill")
        axes.stairs(decode, edges, baseline=None, lw=1.5, label=f"{name}decode", **second)
    axes.set(ylabel="instances", ylim=(0, None), title=f"Estimated load on {curves[0].about.profile}")
    _finish(axes)


def _lengths(axes: Any, curves: list[Curve], what: str) -> None:
    for curve in curves:
        tokens = np.sort(curve.one.workload.column(f"{what}_tokens"))
        share = np.arange(1, len(tokens) + 1) / len(tokens)
        axes.step(tokens, share, where="post", color=curve.colour, label=curve.name)
    axes.set_xscale("log")
    _plain_log(axes.xaxis)
    title = f"{what.capitalize()} lengths"
    axes.set(xlabel=f"{what} tokens", ylabel="share of requests", ylim=(0, 1.01), title=title)
    _finish(axes, legend=len(curves) > 1 and what == "input")


def _plain_log(axis: Any) -> None:
    """Label a logarithmic axis with numbers a reader knows, and enough of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    subs = (1.0,) if high / low > 200 else (1.0, 2.0, 5.0) if high / low > 3 else tuple(range(1, 10))
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def _finish(axes: Any, *, legend: bool = True) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.title.set_fontsize("medium")
    if legend:
        axes.legend(fontsize="small", frameon=False)


def _bin(duration_s: float) -> float:
    choices = (1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0, 1800.0, 3600.0)
    return next((s for s in choices if duration_s / s <= MOST_RATE_POINTS), choices[-1])


def _span(seconds: float) -> str:
    return f"{seconds:g} s" if seconds < 60 else f"{seconds / 60:g} min"
