"""From command-line choices to a workload, and that workload at a rate, drawn by a seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from tidegate.core.errors import ConfigError
from tidegate.workloads.generate import (
    ArrivalProcess,
    Bursts,
    Gamma,
    Poisson,
    arrival_times_s,
    generate,
    parse_token_counts,
    preset,
    read_rate_curve,
    resample,
)
from tidegate.workloads.readers import has_arrivals, read_trace, read_untimed
from tidegate.workloads.reshape import replicate, reseeded
from tidegate.workloads.trace import Workload
from tidegate.workloads.transform import (
    by_session,
    coarsen_blocks,
    limit,
    retime,
    scale_rate,
    scale_tokens,
    schedule_sessions,
    window,
)

DEFAULT_INPUT = "512"
DEFAULT_OUTPUT = "128"


@dataclass(frozen=True, slots=True)
class WorkloadChoice:
    """A trace, an arrival process, or both: then the trace gives lengths and prefixes only.

    ``poisson`` and ``gamma`` are requests per second; ``bursts`` is ``RPS:S,RPS:S``. For a session file
    the process starts sessions, whose turns keep their own times; ``sessions_per_s`` is Poisson, too, and
    takes a timed trace apart into sessions first. ``rate_curve`` is ``FILE:NAME``, scaled to the mean
    ``rate_rps`` if given. Generated lengths are a ``preset``'s, those of ``lengths_from``, or given.
    With ``keep_times`` another rate is more or fewer requests on one clock, where else times are stretched.
    ``columns`` names the trace's columns (``formats.given_format``). ``start_s`` and ``duration_s`` cut a
    window out of the workload after ``scale_rate``. With ``join_blocks`` prefix blocks are joined to ones of
    so many tokens (``transform.coarsen_blocks``): long histories cost simulations time by the block.
    """

    trace: str = ""
    columns: str = ""
    poisson: float | None = None
    gamma: float | None = None
    cv: float | None = None
    bursts: str = ""
    rate_curve: str = ""
    rate_rps: float | None = None
    sessions_per_s: float | None = None
    preset: str = ""
    input_tokens: str = ""
    output_tokens: str = ""
    lengths_from: str = ""
    scale_rate: float = 1.0
    scale_tokens: float = 1.0
    start_s: float = 0.0
    duration_s: float | None = None
    limit: int | None = None
    turn_gap_s: float | None = None
    join_blocks: int | None = None
    keep_times: bool = False
    seed: int = 0

    def describe(self) -> str:
        """Return the workload in one line, for the record of the run."""
        defaults = WorkloadChoice()
        chosen = [(name, getattr(self, name)) for name in self.__slots__]
        return " ".join(f"{name}={value}" for name, value in chosen if value != getattr(defaults, name))


def load_workload(choice: WorkloadChoice, *, trace_flag: str = "--trace") -> Workload:
    """Return the requests in order of arrival, the first at 0 when they come from a timed trace.

    ``trace_flag`` is how the caller's user spells ``choice.trace``, for messages.

    The whole workload is read before any load, so that a malformed line stops the run early. Raises
    TraceError for a bad trace and ConfigError, with all problems at once, for choices that do not
    fit together or an empty workload.
    """
    problems = _problems(choice, trace_flag)
    if problems:
        raise ConfigError(problems)
    process = _process(choice)
    made = read_trace(choice.trace, choice.columns) if process is None else _timed_by(process, choice)
    scaled = scale_tokens(scale_rate(made, choice.scale_rate), choice.scale_tokens)
    if choice.join_blocks is not None:
        scaled = coarsen_blocks(scaled, choice.join_blocks)
    cut = window(scaled, choice.start_s, float("inf") if choice.duration_s is None else choice.duration_s)
    chosen = cut if choice.limit is None else limit(cut, choice.limit)
    if not chosen:
        raise ConfigError("the workload is empty; look at --start, --duration and the trace")
    if choice.trace and process is None:
        chosen = replace(chosen, arrival_s=chosen.arrival_s - chosen.arrival_s[0])
    return chosen


def _problems(choice: WorkloadChoice, trace_flag: str) -> list[str]:
    flags = {
        "--poisson": choice.poisson,
        "--gamma": choice.gamma,
        "--bursts": choice.bursts or None,
        "--rate-curve": choice.rate_curve or None,
        "--sessions-per-s": choice.sessions_per_s,
    }
    processes = [flag for flag, given in flags.items() if given is not None]
    lengths = [choice.input_tokens or choice.output_tokens, choice.lengths_from, choice.preset]
    endless = choice.limit is None and choice.duration_s is None
    gap_s = choice.turn_gap_s
    checks = {
        f"say what to send: {trace_flag} FILE, --poisson RPS, --gamma RPS or --bursts RPS:S,RPS:S": (
            not choice.trace and not processes
        ),
        f"--sessions-per-s needs the sessions of a trace: {trace_flag} FILE": (
            choice.sessions_per_s is not None and not choice.trace
        ),
        "--rps goes with --rate-curve": choice.rate_rps is not None and not choice.rate_curve,
        f"choose one arrival process, not {' and '.join(processes)}": len(processes) > 1,
        "--cv goes with --gamma or --rate-curve": (
            choice.cv is not None and choice.gamma is None and not choice.rate_curve
        ),
        f"{trace_flag} brings its own lengths: drop --input-tokens, --output-tokens, --lengths-from and "
        "--preset": any(lengths) and choice.trace,
        "choose --preset, --lengths-from or --input-tokens and --output-tokens, not several of them": (
            sum(map(bool, lengths)) > 1
        ),
        "an arrival process has no end: give --limit N or --duration S": (
            processes and not choice.trace and endless
        ),
        "--turn-gap goes with a session trace and an arrival process": (
            gap_s is not None and not (choice.trace and processes)
        ),
        f"the rate factor must be positive, got {choice.scale_rate}": not choice.scale_rate > 0,
        f"--join-blocks must be 1 token or more, got {choice.join_blocks}": (
            choice.join_blocks is not None and choice.join_blocks < 1
        ),
        f"--turn-gap must be 0 s or more, got {gap_s}": gap_s is not None and not 0 <= gap_s < float("inf"),
    }
    return [problem for problem, wrong in checks.items() if wrong]


def _timed_by(process: ArrivalProcess, choice: WorkloadChoice) -> Workload:
    times_s = arrival_times_s(process, seed=choice.seed)
    if choice.trace:
        workload = read_untimed(choice.trace, choice.columns)
        if has_arrivals(choice.trace, choice.columns):
            if choice.sessions_per_s is None:
                return retime(workload, times_s)
            workload = by_session(workload)
        return schedule_sessions(workload, times_s, choice.turn_gap_s)
    times_s = _wanted(times_s, choice)
    if choice.lengths_from:
        return resample(times_s, read_untimed(choice.lengths_from), seed=choice.seed)
    if choice.preset:
        lengths = preset(choice.preset)
        return generate(times_s, lengths.inputs, lengths.outputs, seed=choice.seed)
    inputs = parse_token_counts(choice.input_tokens or DEFAULT_INPUT)
    outputs = parse_token_counts(choice.output_tokens or DEFAULT_OUTPUT)
    return generate(times_s, inputs, outputs, seed=choice.seed)


def _wanted(times_s: Iterator[float], choice: WorkloadChoice) -> Iterator[float]:
    """Yield an endless process's times up to the last one that the window and the limit leave."""
    end_s = choice.start_s + (float("inf") if choice.duration_s is None else choice.duration_s)
    left = float("inf") if choice.limit is None else choice.limit
    for time_s in times_s:
        if left <= 0 or time_s / choice.scale_rate >= end_s:
            return
        yield time_s
        left -= time_s / choice.scale_rate >= choice.start_s


def _process(choice: WorkloadChoice) -> ArrivalProcess | None:
    cv = 1.0 if choice.cv is None else choice.cv
    if choice.poisson is not None:
        return Poisson(choice.poisson)
    if choice.sessions_per_s is not None:
        return Poisson(choice.sessions_per_s)
    if choice.rate_curve:
        curve = read_rate_curve(choice.rate_curve, cv)
        return curve if choice.rate_rps is None else curve.with_mean(choice.rate_rps)
    if choice.gamma is not None:
        return Gamma(choice.gamma, cv)
    return Bursts.parse(choice.bursts) if choice.bursts else None


@lru_cache(maxsize=4)
def requests_of(choice: WorkloadChoice) -> Workload:
    """Return the workload at its own rate; the same object again for the same choice.

    A session file without arrival times starts one session per second, as a Poisson process.
    """
    if starts_sessions(choice):
        choice = replace(choice, sessions_per_s=1.0)
    elif choice.turn_gap_s is not None:
        raise ConfigError(f"--turn-gap is for traces without times; {choice.trace} has its own")
    return load_workload(choice)


def starts_sessions(choice: WorkloadChoice) -> bool:
    """Tell whether the trace has no arrival times, so that ``requests_of`` gives its sessions some."""
    return bool(
        choice.trace
        and choice.sessions_per_s is None
        and choice.poisson is None
        and not has_arrivals(choice.trace, choice.columns)
    )


def own_rate_rps(workload: Workload) -> float:
    """Return the mean arrival rate. Raises ConfigError when all requests come at one instant."""
    span_s = float(workload.arrival_s[-1] - workload.arrival_s[0])
    if len(workload) < 2 or span_s <= 0:
        raise ConfigError(
            "the workload has no rate: it needs at least two requests at different times to be scaled to one"
        )
    return (len(workload) - 1) / span_s


def at_rate(workload: Workload, rate_rps: float | None, seed: int) -> Workload:
    """Return the seed's draw of the workload, its time scaled to the mean rate; None keeps its own."""
    drawn = reseeded(workload, seed)
    if rate_rps is None:
        return drawn
    return scale_rate(drawn, rate_rps / own_rate_rps(workload))


def draw_at_rate(choice: WorkloadChoice, rate_rps: float | None, seed: int) -> Workload:
    """Return the seed's draw of ``choice`` at a mean rate, None for its own."""
    workload = requests_of(choice)
    if not choice.keep_times or rate_rps is None:
        return at_rate(workload, rate_rps, seed)
    return replicate(reseeded(workload, seed), rate_rps / own_rate_rps(workload), seed=seed)
