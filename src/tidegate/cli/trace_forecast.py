"""``tidegate trace forecast``: how well sources forecast the load of a trace."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from tidegate.cli.options import Flag
from tidegate.cli.terminal import Advance, note, share_bar
from tidegate.cli.trace_files import load_timed
from tidegate.cli.trace_plot import check_plot, finish, save_plot, time_unit
from tidegate.core.errors import ConfigError
from tidegate.signals.forecast.arima import check_arima
from tidegate.signals.forecast.choice import NAMES, series_sources
from tidegate.signals.forecast.load import SERIES, load_periods
from tidegate.signals.forecast.scoring import SourceScore, score
from tidegate.signals.forecast.source import Floats
from tidegate.workloads.generate import rate_curve_names, read_rate_curve

FORECAST_EXAMPLES = """
    tidegate trace forecast sample:azure-conv --period 60

    tidegate trace forecast day.csv.gz --period 600 --steps 3 --plot day.png

    tidegate trace forecast curves.csv.gz journal.jsonl --source last --source ewma --json
"""
LEAST_PERIODS = 8
TABLE_WIDTH = 110
DAY_S = 86400.0


@dataclass(frozen=True, slots=True)
class KnownSeries:
    """A series of a trace, one value per period, with its scores."""

    trace: str
    name: str
    period_s: float
    values: Floats
    scores: Sequence[SourceScore] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain data; null where something does not apply."""
        sources = [
            {
                "source": one.source,
                "chosen": one.chosen,
                "mape_first_half": _plain(one.mape[0]),
                "mape_second_half": _plain(one.mape[1]),
                "coverage": _plain(one.coverage),
                "answered": _plain(one.answered),
            }
            for one in self.scores
        ]
        series = {"trace": self.trace, "series": self.name, "period_s": self.period_s}
        return {**series, "periods": len(self.values), "sources": sources}


def forecast(
    traces: Annotated[
        list[str],
        typer.Argument(metavar="FILE...", help="A trace, a journal, or FILE[:NAME] of rate curves."),
    ],
    period_s: Annotated[float, Flag("Length of a period; a rate curve has its own.", "S", "--period")] = 60.0,
    steps: Annotated[int, Flag("Periods ahead.", "N", more={"min": 1, "max": 1000})] = 1,
    season_s: Annotated[
        float, Flag("Season of seasonal-naive; 0 for none.", "S", "--season", more={"min": 0})
    ] = DAY_S,
    source: Annotated[
        list[str] | None, Flag(f"Of {', '.join(NAMES)}; repeatable. All that are installed.", "NAME")
    ] = None,
    long_tokens: Annotated[
        float | None, Flag("A prompt above this is long (the mean prompt of the first half).", "N", "--long")
    ] = None,
    plot: Annotated[Path | None, Flag("Draw the chosen forecasts (extra: plots).", "FILE.png|svg")] = None,
    as_json: Annotated[bool, Flag("Print JSON.", name="--json")] = False,
) -> None:
    """Score sources of forecasts on a trace's rate, lengths and share of long prompts.

    The source of each series is chosen by the first half and scored on the
    second: mean absolute percentage error, and how many values the interval of
    80 % held. A source more complex than another is chosen only if it is
    clearly better.
    """
    if not 0 < period_s < math.inf:
        raise ConfigError(f"--period is a positive number of seconds, got {period_s}")
    if plot is not None:
        check_plot(plot, "trace forecast")
    names = tuple(source) if source else _installed()
    series_sources(names, season=0)
    series = [one for trace in traces for one in _series(trace, period_s, long_tokens)]
    scored = []
    with share_bar("forecasting") as advance:
        for number, one in enumerate(series):
            sources = series_sources(names, season=round(season_s / one.period_s))
            done = _part(advance, number, len(series), f"{one.trace} {one.name}")
            scored.append(replace(one, scores=score(one.values, sources, steps, done)))
    if as_json:
        found = {"steps": steps, "series": [one.to_json() for one in scored]}
        typer.echo(json.dumps(found, indent=2, allow_nan=False))
    else:
        _show(scored, steps)
    if plot is not None:
        _draw(plot, scored, steps)
        note(f"wrote {plot}")


def _installed() -> tuple[str, ...]:
    try:
        check_arima()
    except ConfigError as error:
        note(f"without arima: {error}")
        return tuple(name for name in NAMES if name != "arima")
    return NAMES


def _part(advance: Advance, number: int, count: int, what: str) -> Callable[[float], None]:
    def done(share: float) -> None:
        advance((number + share) / count, what)

    return done


def _series(trace: str, period_s: float, long_tokens: float | None) -> Iterator[KnownSeries]:
    """Yield the series of a trace, or the rates of curves. Raises ConfigError where they are too short."""
    curves = rate_curve_names(trace)
    for text in curves:
        curve = read_rate_curve(text)
        rates = np.array(curve.rates_rps)
        rates[list(curve.missing)] = np.nan
        yield _checked(KnownSeries(text.rpartition("/")[2], SERIES[0], curve.step_s, rates))
    if curves:
        return
    workload = load_timed(trace)
    if long_tokens is None:
        half = workload.arrival_s <= workload.arrival_s[-1] / 2
        long_tokens = float(workload.input_tokens[half].mean())
    periods = np.array(load_periods(workload, period_s, long_tokens)).reshape(-1, len(SERIES))
    for at, name in enumerate(SERIES):
        yield _checked(KnownSeries(Path(trace).name, name, period_s, periods[:, at]))


def _checked(series: KnownSeries) -> KnownSeries:
    if len(series.values) < LEAST_PERIODS:
        raise ConfigError(
            f"{series.trace}: {len(series.values)} whole periods of {series.period_s:g} s; at least "
            f"{LEAST_PERIODS} are needed: choose a shorter --period"
        )
    return series


def _show(scored: Sequence[KnownSeries], steps: int) -> None:
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    for number, (trace, group) in enumerate(groupby(scored, lambda one: one.trace)):
        series = list(group)
        if number:
            console.print()
        ahead = f"{steps} period{'s' if steps > 1 else ''} of {series[0].period_s:g} s ahead"
        console.print(f"{trace}: {ahead}, MAPE of the second half", highlight=False, soft_wrap=True)
        table = Table(box=None, padding=(0, 2, 0, 0))
        table.add_column("series")
        for one in series[0].scores:
            table.add_column(one.source, justify="right")
        table.add_column("chosen")
        table.add_column("in interval", justify="right")
        table.add_column("periods", justify="right")
        for known in series:
            chosen = next(one for one in known.scores if one.chosen)
            table.add_row(
                known.name,
                *(_percent(one.mape[1]) + ("" if one.answered else "*") for one in known.scores),
                chosen.source,
                _percent(chosen.coverage, digits=0),
                str(len(known.values)),
            )
        console.print(table, highlight=False)
    if any(not one.answered for known in scored for one in known.scores):
        console.print("* a simpler source answered in its place: too little history")


def _percent(share: float, digits: int = 1) -> str:
    return "-" if math.isnan(share) else f"{share:.{digits}%}"


def _plain(share: float) -> float | None:
    return None if math.isnan(share) else round(share, 6)


def _draw(path: Path, scored: Sequence[KnownSeries], steps: int) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.1 * len(scored) + 0.6), layout="constrained")
    rows = figure.subplots(len(scored), 1, squeeze=False)[:, 0]
    for axes, one in zip(rows, scored, strict=True):
        chosen = next(score for score in one.scores if score.chosen)
        unit_s, unit = time_unit(len(one.values) * one.period_s)
        at = np.arange(len(one.values)) * one.period_s / unit_s
        axes.fill_between(at, chosen.low, chosen.high, color="C0", alpha=0.2, lw=0, label="80 % interval")
        axes.plot(at, one.values, color="0.2", lw=0.8, label="came")
        axes.plot(at, chosen.mean, color="C0", lw=0.8, label=f"{chosen.source}, {steps} ahead")
        axes.axvline(at[len(at) // 2], color="0.6", lw=0.8, ls=":")
        axes.set(title=f"{one.trace}  {one.name}", xlabel=unit, xlim=(0, at[-1]), ylim=(0, None))
        finish(axes, legend=True)
    save_plot(figure, path, "trace forecast")
