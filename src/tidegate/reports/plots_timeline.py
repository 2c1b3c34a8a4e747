"""The charts over time: roles over the request rate, and queues, decodes and KV use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tidegate.measure.run_view import RunView
from tidegate.reports.comparison import ComparedSystem
from tidegate.reports.plot_style import ROLE_COLOURS, Look

SMOOTH_WINDOWS = 5


def draw_rate(axis: Any, entry: ComparedSystem) -> None:
    """The offered rate, as arrivals per window and smoothed."""
    view = _view(entry)
    at_s = _middles(view)
    axis.fill_between(at_s, view.rate_rps, color="#BBBBBB", lw=0, step="mid")
    axis.plot(at_s, _smoothed(view.rate_rps), color="#222222", lw=1.4)
    axis.set(title="Offered rate", ylabel="requests/s", ylim=(0, None))


def draw_roles(axis: Any, entry: ComparedSystem) -> None:
    """How many instances carry which label, stacked."""
    view = _view(entry)
    columns = {
        "prefill": view.prefill_instances,
        "decode": view.decode_instances,
        "mixed": view.mixed_instances,
    }
    used = {name: values for name, values in columns.items() if any(values)}
    axis.stackplot(
        view.at_s, list(used.values()), labels=list(used), colors=[ROLE_COLOURS[name] for name in used],
        step="post", lw=0,
    )  # fmt: skip
    axis.set_xlim(0, view.at_s[-1] + view.window_s)
    total = max((sum(row) for row in zip(*used.values(), strict=True)), default=1.0)
    flips = (entry.at_common or {}).get("flips") or 0
    axis.set(
        title=f"{entry.title}: {flips} flip{'' if flips == 1 else 's'}", ylabel="instances", ylim=(0, total)
    )
    axis.grid(visible=False)
    axis.yaxis.get_major_locator().set_params(integer=True)


def draw_over_time(
    axis: Any,
    entries: Sequence[ComparedSystem],
    name: str,
    title: str,
    unit: str,
    look: Mapping[str, Look],
    scale: float = 1.0,
) -> None:
    """One series of the view, a line per system."""
    for entry in entries:
        view, style = _view(entry), look[entry.system]
        raw = getattr(view, name)
        values = _attained_share(view) if name == "attained" else raw
        axis.plot(
            _middles(view),
            scale * np.asarray(values),
            color=style.colour,
            ls=style.dash,
            lw=0.7 * style.width,
            label=entry.title,
        )
    axis.set(title=title, ylabel=unit)
    axis.set_ylim(bottom=0)


def _view(entry: ComparedSystem) -> RunView:
    assert entry.view is not None
    return entry.view


def _middles(view: RunView) -> list[float]:
    return [at_s + view.window_s / 2 for at_s in view.at_s]


def _attained_share(view: RunView) -> list[float]:
    """Return the attained share over SMOOTH_WINDOWS windows around each; NaN where nothing arrived."""
    weights = np.ones(min(SMOOTH_WINDOWS, len(view.at_s)))
    arrived = np.convolve(view.rate_rps, weights, "same")
    met = np.convolve(np.array([value or 0.0 for value in view.attained]) * view.rate_rps, weights, "same")
    shares: list[float] = np.divide(met, arrived, out=np.full(len(met), np.nan), where=arrived > 0).tolist()
    return shares


def _smoothed(values: Sequence[float]) -> list[float]:
    if len(values) < SMOOTH_WINDOWS:
        return list(values)
    weights = np.ones(SMOOTH_WINDOWS)
    counted = np.convolve(np.ones(len(values)), weights, "same")
    smoothed: list[float] = (np.convolve(values, weights, "same") / counted).tolist()
    return smoothed
