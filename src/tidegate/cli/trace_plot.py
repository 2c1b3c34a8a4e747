"""Pictures of traces: rate, drift of the input:output ratio, load by phase, lengths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tidegate.cli.outputs import claim_file
from tidegate.cli.trace_files import Described
from tidegate.core.errors import ConfigError
from tidegate.reports.plot_style import plain_log_ticks

SUFFIXES = (".png", ".svg", ".pdf")
RATE_BINS_S = (1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0, 1800.0, 3600.0)
MOST_RATE_POINTS = 150
"""Points of a rate line: finer looks like noise."""


Curve = tuple[Described, str]
"""A trace and its colour."""


def check_plot(path: Path, command: str) -> None:
    """Raise ConfigError when the picture cannot be made: unknown suffix, no matplotlib, or a file there."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"--plot {path}: the name must end in {', '.join(SUFFIXES)}")
    claim_file(path, command, "--plot")
    try:
        import matplotlib  # noqa: F401 - only whether it is there
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib") from None


def plot_traces(path: Path, described: Sequence[Described]) -> None:
    """Draw the traces, one colour each, into ``path``; untimed ones appear in the length panels only.

    Raises ConfigError when the file cannot be written.
    """
    from matplotlib.figure import Figure

    curves = [(one, f"C{k % 10}") for k, one in enumerate(described)]
    timed = [curve for curve in curves if curve[0].timed]
    with_load = [curve for curve in timed if curve[0].load]
    panels = (2 if timed else 0) + (1 if with_load else 0)
    figure = Figure(figsize=(10, 2.4 * panels + 3.2), layout="constrained")
    grid = figure.add_gridspec(panels + 1, 2)
    if timed:
        longest_s = max(float(_times_s(one)[-1]) for one, _ in timed)
        unit_s, unit = time_unit(longest_s)
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
    figure.suptitle(_name(described[0]) if len(curves) == 1 else "", fontsize="medium")
    save_plot(figure, path, "trace info")


def save_plot(figure: Any, path: Path, command: str) -> None:
    """Write a figure that names ``command``. Raises ConfigError when the file cannot be written."""
    try:
        told = "Software" if path.suffix == ".png" else "Creator"
        figure.savefig(path, dpi=130, metadata={told: f"tidegate {command}"})
    except OSError as error:
        raise ConfigError(f"--plot {path}: cannot write there: {error.strerror}") from None


def _name(one: Described) -> str:
    return Path(one.name).name


def _times_s(one: Described) -> Any:
    """Return the arrivals, from the first request on."""
    return one.workload.arrival_s - one.workload.arrival_s[0]


def time_unit(duration_s: float) -> tuple[float, str]:
    """Return the unit of a time axis, in seconds and by name."""
    if duration_s > 4 * 3600:
        return 3600.0, "hours"
    return (60.0, "minutes") if duration_s > 300 else (1.0, "seconds")


def _draw_rates(axes: Any, timed: list[Curve], unit_s: float, longest_s: float) -> None:
    bin_s = next((s for s in RATE_BINS_S if longest_s / s <= MOST_RATE_POINTS), RATE_BINS_S[-1])
    for one, colour in timed:
        times_s = _times_s(one)
        # The last bin is cut short by the trace's end and would show a dip.
        bins = max(1, int(times_s[-1] // bin_s))
        counts, edges = np.histogram(times_s, bins=bins, range=(0.0, bins * bin_s))
        axes.stairs(counts / bin_s, edges / unit_s, baseline=None, color=colour, label=_name(one))
    axes.set(ylabel="requests/s", ylim=(0, None), title=f"Rate, by {_span(bin_s)}")
    finish(axes, legend=len(timed) > 1)


def _draw_ratios(axes: Any, timed: list[Curve], unit_s: float) -> None:
    for one, colour in timed:
        about = one.statistics
        middles_s = np.array([w.start_s + w.length_s / 2 for w in about.windows])
        ratios = [float("nan") if w.ratio is None else w.ratio for w in about.windows]
        axes.plot(middles_s / unit_s, ratios, ".-", color=colour, ms=4, lw=1)
        axes.axhline(about.ratio, color=colour, lw=0.8, ls=":")
    axes.set_yscale("log")
    plain_log_ticks(axes.yaxis)
    span = _span(timed[0][0].statistics.windows[0].length_s)
    axes.set(ylabel="input : output", title=f"Phase mix, tokens by {span} (dotted: whole trace)")
    finish(axes, legend=False)


def _draw_loads(axes: Any, curves: list[Curve], unit_s: float) -> None:
    alone = len(curves) == 1
    for one, colour in curves:
        name = "" if alone else f"{_name(one)}: "
        load = one.load
        edges = np.array([w.start_s for w in load] + [load[-1].start_s + load[-1].length_s]) / unit_s
        decode = [float("nan") if w.decode is None else w.decode for w in load]
        second = {"color": "C1"} if alone else {"color": colour, "ls": "--"}
        prefill = [w.prefill for w in load]
        axes.stairs(prefill, edges, baseline=None, lw=1.5, color=colour, label=f"{name}prefill")
        axes.stairs(decode, edges, baseline=None, lw=1.5, label=f"{name}decode", **second)
    title = f"Estimated load on {curves[0][0].profile}"
    axes.set(ylabel="instances", ylim=(0, None), title=title)
    finish(axes, legend=True)


def _draw_lengths(axes: Any, curves: list[Curve], what: str) -> None:
    for one, colour in curves:
        tokens = np.sort(one.workload.column(f"{what}_tokens"))
        share = np.arange(1, len(tokens) + 1) / len(tokens)
        axes.step(tokens, share, where="post", color=colour, label=_name(one))
    axes.set_xscale("log")
    plain_log_ticks(axes.xaxis)
    title = f"{what.capitalize()} lengths"
    axes.set(xlabel=f"{what} tokens", ylabel="share of requests", ylim=(0, 1.01), title=title)
    finish(axes, legend=len(curves) > 1 and what == "input")


def finish(axes: Any, *, legend: bool) -> None:
    """Give axes the look that all pictures of traces have."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.title.set_fontsize("medium")
    if legend:
        axes.legend(fontsize="small", frameon=False)


def _span(seconds: float) -> str:
    return f"{seconds:g} s" if seconds < 60 else f"{seconds / 60:g} min"
