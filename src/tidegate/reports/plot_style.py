"""How charts that matplotlib draws look."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tidegate.core.errors import SetupError

INK = "#222222"
MARK_LINE: dict[str, Any] = {"color": "#444444", "lw": 1, "ls": (0, (4, 3))}
SETTINGS: Any = {
    "figure.dpi": 100,
    "savefig.dpi": 160,
    "font.size": 10,
    "text.parse_math": False,
    "font.family": ["DejaVu Sans", "sans-serif"],
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


class NoPlots(SetupError):
    """matplotlib is not installed."""


@contextmanager
def styled(
    width_in: float, height_in: float, rows: int = 1, *, height_ratios: list[float] | None = None
) -> Iterator[Any]:
    """Give ``(figure, axes grid)`` in the house style. Raises NoPlots when matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise NoPlots("PNG files need matplotlib: pip install matplotlib") from None
    from matplotlib.figure import Figure

    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(width_in, height_in), layout="constrained")
        yield figure, figure.subplots(rows, 1, squeeze=False, height_ratios=height_ratios)


def note_at(axis: Any, text: str, at: tuple[float, float], offset: tuple[float, float], **more: Any) -> None:
    """Write small text ``offset`` points from ``at``; keywords are those of ``annotate``."""
    axis.annotate(text, at, xytext=offset, textcoords="offset points", **({"fontsize": 8} | more))


def note_along(axis: Any, x: float, text: str) -> None:
    """Write small text along a vertical line at ``x``, above the axis."""
    along = {"xycoords": ("data", "axes fraction"), "rotation": 90, "ha": "right", "va": "bottom"}
    note_at(axis, text, (x, 0), (-3, 4), **along)


def plain_log_ticks(axis: Any) -> None:
    """Label a logarithmic axis with numbers that a reader knows, and enough of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    subs = (1.0,) if high / low > 316 else (1.0, 2.0, 5.0) if high / low > 3 else tuple(range(1, 10))
    axis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())
