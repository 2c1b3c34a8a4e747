"""The Python API: load a trace, simulate systems on it, compare them.

What is here is re-exported by ``tidegate`` itself. Nothing heavy is imported before it is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tidegate.core.defaults import DEFAULT_SYSTEM
from tidegate.core.errors import ConfigError

if TYPE_CHECKING:
    from tidegate.measure.request_table import Seconds
    from tidegate.sim import SimRun
    from tidegate.workloads.trace import Workload

DEFAULT_PROFILE = "h100_sxm/llama-3.1-8b"
DEFAULT_SLO = "ttft:1000,tpot:50"
PERCENTILES = (50, 90, 99)


def load_trace(
    source: str | Path,
    *,
    requests: int | None = None,
    duration_s: float | None = None,
    turn_gap_s: float | None = None,
) -> Workload:
    """Read a trace of any format that ``tidegate trace info`` reads, or a packaged ``sample:NAME``.

    ``requests`` keeps the first N, ``duration_s`` those of the first seconds. A session file without arrival
    times starts one session per second; ``turn_gap_s`` parts its turns where the file does not. Raises
    TraceError, with file, line and column, for a malformed one.
    """
    from tidegate.workloads.choice import WorkloadChoice, load_workload, starts_sessions

    choice = WorkloadChoice(trace=str(source), limit=requests, duration_s=duration_s, turn_gap_s=turn_gap_s)
    return load_workload(replace(choice, sessions_per_s=1.0) if starts_sessions(choice) else choice)


def list_systems() -> dict[str, str]:
    """Return every system by name with a line about it, installed third-party ones included.

    The line of one that does not load says why.
    """
    from tidegate.systems import SYSTEMS, make_system

    summaries = {}
    for name in SYSTEMS.names():
        try:
            summaries[name] = make_system(name).summary
        except Exception as error:
            summaries[name] = f"does not load: {type(error).__name__}: {error}"
    return summaries


@dataclass(frozen=True, slots=True, eq=False)
class SimulationResult:
    """One simulated run. ``run`` has everything: requests as columns, timeline, instances, flips.

    ``rate_rps`` is the mean arrival rate; None when all requests come at one instant. ``price_per_h`` is what
    an instance costs, where that was told.
    """

    system: str
    rate_rps: float | None
    run: SimRun
    price_per_h: float | None = None

    @property
    def attainment(self) -> float:
        """The share of offered requests that met both latency targets."""
        return self.run.attained / max(1, len(self.run.requests))

    def ttft_s(self, percentile: float = 50) -> float:
        """Return a percentile of TTFT in seconds over the answered requests."""
        return self._percentile("ttft_s", percentile)

    def tpot_s(self, percentile: float = 50) -> float:
        """Return a percentile of TPOT in seconds over the answered requests of two tokens or more."""
        return self._percentile("tpot_s", percentile)

    def row(self) -> dict[str, Any]:
        """Return the run in one row: what ``ComparisonResult.rows`` holds of it."""
        return {
            "system": self.system,
            "rate_rps": self.rate_rps,
            "requests": len(self.run.requests),
            "attainment": self.attainment,
            **{f"ttft_p{p}_s": self.ttft_s(p) for p in PERCENTILES},
            **{f"tpot_p{p}_s": self.tpot_s(p) for p in PERCENTILES},
            **{name: getattr(self.run, name) for name in ("flips", "migrations", "preemptions")},
            "instance_hours": self.run.instance_hours,
            **({} if self.price_per_h is None else {"cost": self.run.instance_hours * self.price_per_h}),
        }

    def to_pandas(self) -> Any:
        """Return one row per request as a pandas DataFrame. Raises ImportError without pandas."""
        import pandas as pd

        table = self.run.requests
        names = [*table.instances, None]
        columns = {
            "arrival_s": table.arrival_s,
            "input_tokens": table.input_tokens,
            "output_tokens": table.output_tokens,
            "outcome": [table.outcomes[code] for code in table.outcome],
            "ttft_s": table.ttft_s,
            "tpot_s": table.tpot_s,
            "attained": table.attained,
            "prefill_on": [names[at] for at in table.prefill_on],
            "decode_on": [names[at] for at in table.decode_on],
            "cached_tokens": table.cached_tokens,
            "preemptions": table.preemptions,
            "migrations": table.migrations,
        }
        return pd.DataFrame(columns | {f"{stage}_s": seconds for stage, seconds in table.stages_s.items()})

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw the shares of answered requests within a TTFT and within a TPOT.

        Returns the matplotlib figure; ``path`` saves it, too. Raises ImportError without matplotlib.
        """
        return _plot_cdfs([self], path)

    def _answered(self, name: str) -> Seconds:
        """Return the known values of ``ttft_s`` or ``tpot_s`` among the requests answered in full."""
        import numpy as np

        values: Seconds = getattr(self.run.requests, name)
        return values[self.run.requests.ok & np.isfinite(values)]

    def _percentile(self, name: str, percentile: float) -> float:
        import numpy as np

        known = self._answered(name)
        return float(np.percentile(known, percentile)) if len(known) else float("nan")


@dataclass(frozen=True, slots=True, eq=False)
class ComparisonResult:
    """Systems on one workload at one or more rates: ``results`` in the order in which they were asked for."""

    results: tuple[SimulationResult, ...]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One plain row per run."""
        return [result.row() for result in self.results]

    def to_pandas(self) -> Any:
        """Return one row per run as a pandas DataFrame. Raises ImportError without pandas."""
        import pandas as pd

        return pd.DataFrame(self.rows)

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw SLO attainment over the rate, or latency distributions where there is one rate.

        Returns the matplotlib figure; ``path`` saves it, too. Raises ImportError without matplotlib.
        """
        if len({result.rate_rps for result in self.results}) == 1:
            return _plot_cdfs(self.results, path)
        figure, axis = _figure(1)
        for system in dict.fromkeys(result.system for result in self.results):
            points = sorted((r.rate_rps, r.attainment) for r in self.results if r.system == system)
            axis[0].plot(*zip(*points, strict=True), marker="o", label=system)
        axis[0].set(xlabel="requests/s", ylabel="SLO attainment", ylim=(0, 1.02))
        axis[0].axhline(0.9, color="grey", linewidth=0.8, linestyle="--")
        return _finished(figure, axis, path)


def simulate(
    trace: Workload | str | Path,
    system: str = DEFAULT_SYSTEM,
    *,
    instances: int | str | tuple[int, int] = 4,
    profile: str = DEFAULT_PROFILE,
    split: str | None = None,
    slo: str = DEFAULT_SLO,
    slo_classes: Mapping[str, str] | None = None,
    rate_rps: float | None = None,
    seed: int = 0,
    lengths: str = "",
    chunks: str | None = None,
    journal: IO[bytes] | None = None,
) -> SimulationResult:
    """Serve a trace with a system on simulated instances, in virtual time.

    ``system`` is a name of ``list_systems``, with an order as in ``arrow+edf``; ``instances`` is their
    number, or as ``"2..8"`` or ``(2, 8)`` the least and the most: the run begins with the least, or with
    those of ``split``, and the system adds and removes the others. ``profile`` is one that
    ``tidegate sim --profile`` takes; ``split`` is ``P:D`` at the start; ``slo_classes`` has
    targets for classes that the trace names, the others have ``slo``; ``rate_rps`` scales the trace's time
    to that mean rate; a ``seed`` other than 0 permutes requests within each minute; ``lengths`` names who
    predicts what is left of answers (``tidegate sim --lengths``); ``chunks`` is ``fixed`` or ``slack``, how
    much of prompts joins decodes in a step, None for the system's own; ``journal`` gets every decision and
    outcome as JSON lines. The same arguments give the same result.
    Raises ConfigError, with all problems of the options at once, and TraceError for a malformed trace.
    """
    from tidegate.core.notation import FleetRange, parse_range, parse_split
    from tidegate.core.slo import Slo
    from tidegate.costs.named_profile import load_profile
    from tidegate.dataplane.replica import replicas_of
    from tidegate.sim import SimSettings
    from tidegate.sim import simulate as run_simulation
    from tidegate.systems import make_system
    from tidegate.workloads.choice import at_rate, own_rate_rps
    from tidegate.workloads.slo_classes import targets_by_class

    problems: list[str] = []
    targets, sides, classes = Slo(), None, dict[str, Slo]()
    settings = SimSettings()
    with _noting(problems, ""):
        targets = Slo.parse(slo)
    with _noting(problems, ""):
        classes = {name: Slo.parse(text) for name, text in (slo_classes or {}).items()}
    with _noting(problems, f"split {split!r}: "):
        sides = None if split is None else parse_split(split)
    size = FleetRange(1, 1)
    with _noting(problems, f"instances {instances!r}: "):
        size = FleetRange(*instances) if isinstance(instances, tuple) else parse_range(str(instances))
    with _noting(problems, ""):
        spares = size.spares(sides) if size.ceiling else 0
        settings = SimSettings(slo=targets, lengths=lengths, spares=spares)
    with _noting(problems, ""):
        bounds, delays_s = (size.least, size.most) if size.ceiling else None, settings.start_delays_s
        composed = make_system(
            system, split=sides, slo=targets, fleet=bounds, start_delay_s=delays_s, chunks=chunks
        )
    with _noting(problems, ""):
        chosen = load_profile(profile)
    if rate_rps is not None and not 0 < rate_rps < float("inf"):
        problems.append(f"rate_rps is a positive number of requests per second, got {rate_rps}")
    if problems:
        raise ConfigError(problems)
    workload = load_trace(trace) if isinstance(trace, str | Path) else trace
    drawn = at_rate(workload, rate_rps, seed)
    settings = replace(settings, slo_classes=targets_by_class([workload], classes, targets))
    run = run_simulation(drawn, composed, replicas_of(chosen, size.most), settings, journal=journal)
    if rate_rps is None and len(drawn) > 1 and drawn.arrival_s[-1] > drawn.arrival_s[0]:
        rate_rps = own_rate_rps(drawn)
    return SimulationResult(composed.name, rate_rps, run)


def compare(
    trace: Workload | str | Path,
    systems: str | Iterable[str],
    *,
    rates_rps: Sequence[float | None] = (None,),
    price_per_h: float | None = None,
    **options: Any,
) -> ComparisonResult:
    """Simulate one or several systems on one trace, at each of ``rates_rps``; None is the trace's own rate.

    ``price_per_h`` of an instance gives rows a ``cost``, in its currency. ``options`` are those of
    ``simulate``. Raises ConfigError for a price that is none. To search goodputs over seeds, with limits and
    a report, use ``tidegate compare``.
    """
    if price_per_h is not None and not 0 < price_per_h < float("inf"):
        raise ConfigError(f"price_per_h is a positive amount, got {price_per_h}")
    workload = load_trace(trace) if isinstance(trace, str | Path) else trace
    names = [systems] if isinstance(systems, str) else systems
    asked = [(system, rate) for system in names for rate in rates_rps]
    runs = [simulate(workload, system, rate_rps=rate, **options) for system, rate in asked]
    return ComparisonResult(tuple(replace(run, price_per_h=price_per_h) for run in runs))


@contextmanager
def _noting(problems: list[str], about: str) -> Iterator[None]:
    """Add what is wrong to ``problems`` instead of raising it."""
    try:
        yield
    except ConfigError as error:
        problems += error.problems
    except ValueError as error:
        problems.append(f"{about}{error}")


def _figure(panels: int) -> tuple[Any, Any]:
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(1, panels, figsize=(6 * panels, 4), squeeze=False)
    pyplot.close(figure)  # the caller has it: pyplot would keep it for good, and a notebook show it twice
    return figure, axis[0]


def _plot_cdfs(results: Sequence[SimulationResult], path: str | Path | None) -> Any:
    import numpy as np

    figure, axes = _figure(2)
    for axis, name in zip(axes, ("ttft_s", "tpot_s"), strict=True):
        for result in results:
            known = np.sort(result._answered(name)) * 1e3
            axis.plot(known, np.arange(1, len(known) + 1) / max(1, len(known)), label=result.system)
        axis.set(xlabel=f"{name[:4].upper()} [ms]", ylabel="share of answered requests", xscale="log")
    return _finished(figure, axes, path)


def _finished(figure: Any, axes: Any, path: str | Path | None) -> Any:
    for axis in axes:
        axis.legend()
    figure.tight_layout()
    if path is not None:
        figure.savefig(path)
    return figure
