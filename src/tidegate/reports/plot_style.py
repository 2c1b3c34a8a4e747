"""How charts look: one style per system throughout a report, safe for colour-blind readers."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tidegate.core.errors import SetupError

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
"""Okabe and Ito 2008, the yellow that white swallows replaced by grey, in the order of most contrast."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":")
ROLE_COLOURS = {"prefill": "#E69F00", "decode": "#0072B2", "mixed": "#009E73"}
STAGE_COLOURS = {
    "queue": "#D55E00",
    "prefill": "#E69F00",
    "transfer": "#CC79A7",
    "decode_queue": "#7F7F7F",
    "first_step": "#56B4E9",
    "decode": "#0072B2",
}
INK = "#222222"
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
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
    "svg.hashsalt": "tidegate",
}


class NoPlots(SetupError):
    """matplotlib is not installed."""


@dataclass(frozen=True, slots=True)
class Look:
    """A system's colour, marker, dash pattern and line width.

    Lines get thinner from system to system, so that of equal curves both can be seen.
    """

    colour: str
    marker: str
    dash: str
    width: float

    def line(self, axis: Any, xs: Any, ys: Any, label: str, width: float = 1.0, **more: Any) -> None:
        """Draw a curve of this system, ``width`` times as wide as usual."""
        axis.plot(xs, ys, color=self.colour, ls=self.dash, lw=width * self.width, label=label, **more)


def looks(systems: Sequence[str]) -> dict[str, Look]:
    """Return a look per system; systems beyond the number of colours repeat them with another dash."""
    return {
        system: Look(
            COLOURS[index % len(COLOURS)],
            MARKERS[index % len(MARKERS)],
            DASHES[index // len(COLOURS) % len(DASHES)],
            max(1.2, 3.4 - 0.45 * index),
        )
        for index, system in enumerate(systems)
    }


@contextmanager
def styled(width_in: float, height_in: float, rows: int = 1, columns: int = 1, **more: Any) -> Iterator[Any]:
    """Give ``(figure, axes grid)`` in the house style. Raises NoPlots when matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise NoPlots("charts need matplotlib: pip install 'tidegate[plots]'") from None
    from matplotlib.figure import Figure

    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(width_in, height_in), layout="constrained")
        yield figure, figure.subplots(rows, columns, squeeze=False, **more)


def note_at(axis: Any, text: str, at: tuple[float, float], offset: tuple[float, float], **more: Any) -> None:
    """Write small text ``offset`` points from ``at``; keywords are those of ``annotate``."""
    axis.annotate(text, at, xytext=offset, textcoords="offset points", **({"fontsize": 8} | more))


def note_along(axis: Any, x: float, text: str) -> None:
    """Write small text along a vertical line at ``x``, above the axis."""
    along = {"xycoords": ("data", "axes fraction"), "rotation": 90, "ha": "right", "va": "bottom"}
    note_at(axis, text, (x, 0), (-3, 4), **along)


def name_bars(axis: Any, labels: Sequence[str]) -> None:
    """Name the horizontal bars at 0, 1, ..., the first on top."""
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)


def plain_log_ticks(axis: Any) -> None:
    """Label a logarithmic axis with numbers that a reader knows, and enough of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    subs = (1.0,) if high / low > 316 else (1.0, 2.0, 5.0) if high / low > 3 else tuple(range(1, 10))
    axis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def as_png(figure: Any) -> bytes:
    return _saved(figure, "png")


def as_svg(figure: Any, prefix: str) -> str:
    """Return the figure as an ``<svg>`` element to put into a page; ids start with ``prefix``.

    Ids are per page in HTML, and matplotlib's repeat from figure to figure.
    """
    text = _saved(figure, "svg").decode("utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{prefix}-", text)
    return re.sub(r'^<svg([^>]*?) width="[^"]*"', r"<svg\1", re.sub(r' height="[^"]*pt"', "", text, count=1))


def _saved(figure: Any, kind: str) -> bytes:
    buffer = io.BytesIO()
    # No date, so that the same figures give the same file.
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    figure.savefig(buffer, format=kind, metadata=metadata)
    return buffer.getvalue()
