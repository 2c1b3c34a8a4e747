"""Traffic like that of a kind of application, made from its published statistics: ``like:NAME`` as a trace.

Lengths are lognormal and gaps between arrivals gamma-distributed; a draw with another seed is traffic that
nobody has seen. Means of the four multi-round workloads are those of AMPD's evaluation (arXiv 2602.14516,
section 6), read as tokens per round: an answer of 13 tokens, as a session's 50 over four rounds would have,
holds no call of a tool. Spreads and pauses are ours: the paper has none. Three are made to strain:
``spikes``, ``inversion`` and ``tails``, at a rate of their own, which eight large instances serve with room.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import numpy as np

from tidegate.core.errors import TraceError
from tidegate.workloads.sessions import with_prefixes
from tidegate.workloads.trace import Floats, Integers, Workload, array

LIKE_PREFIX = "like:"
REQUESTS = 5000
"""Requests of a draw where rounds stand alone, at a mean of one per second."""
SESSIONS = 400
"""Sessions of a draw with several rounds."""
CYCLES = 3
"""Cycles of a draw that has phases."""
ANSWER_S_PER_TOKEN = 0.02
"""What a round's answer is taken to last, per token, where its turns are given times: a trace's times are
those of an open loop."""


@dataclass(frozen=True, slots=True)
class Length:
    """A lognormal length in tokens by mean and coefficient of variation; at least 1."""

    mean: float
    cv: float

    def draw(self, rng: np.random.Generator, count: int) -> Integers:
        """Return ``count`` independent draws."""
        middle, deviation = lognormal_parameters(self.mean, self.cv)
        return np.maximum(1, np.round(rng.lognormal(middle, deviation, count))).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a cycle of traffic: Poisson arrivals and lengths of their own, for so many seconds."""

    seconds: float
    rate_rps: float
    new: Length
    output: Length


@dataclass(frozen=True, slots=True)
class Like:
    """A kind of traffic. ``new`` are the prompt tokens that a round adds to its session's history.

    ``rounds`` is the mean number of rounds of a session: all alike where ``steady``, else one and a Poisson
    number more. ``pause_s`` is the mean pause before each later round, exponential. ``gaps_cv`` is that of
    arrivals where rounds stand alone, ``phases`` what comes in turn instead.
    """

    about: str
    new: Length
    output: Length
    gaps_cv: float = 1.0
    rounds: float = 1.0
    steady: bool = False
    pause_s: float = 0.0
    phases: tuple[Phase, ...] = ()

    @property
    def count(self) -> int:
        """What a draw has unless told otherwise."""
        if self.phases:
            return round(CYCLES * sum(phase.seconds * phase.rate_rps for phase in self.phases))
        return SESSIONS if self.rounds > 1 else REQUESTS


def _phased(about: str, *phases: Phase) -> Like:
    weights = np.array([phase.seconds * phase.rate_rps for phase in phases])
    new, output = (
        Length(
            float(np.average([length.mean for length in lengths], weights=weights)),
            max(each.cv for each in lengths),
        )
        for lengths in zip(*((phase.new, phase.output) for phase in phases), strict=True)
    )
    return Like(about, new, output, phases=phases)


_CHAT = (Length(1000, 1.0), Length(200, 1.0))
_READ, _WRITE = (Length(6000, 0.7), Length(60, 0.7)), (Length(300, 0.7), Length(600, 0.7))
_TAILS = (Length(1200, 4.0), Length(300, 3.0))
_BURSTY = "short answers behind mid-size prompts, very bursty"
_CALLS, _THREE = "calls of tools", "three retrievals"
LIKES: Mapping[str, Like] = MappingProxyType({
    "code": Like(_BURSTY, Length(2048, 0.9), Length(28, 1.0), gaps_cv=13.0),
    "short": Like("very short prompts and answers", Length(290, 1.2), Length(37, 1.2), gaps_cv=2.8),
    "long": Like("long prompts, short answers", Length(15000, 0.8), Length(150, 1.0), gaps_cv=1.5),
    "reasoning": Like("long answers", Length(1367, 2.0), Length(885, 1.4), gaps_cv=1.6),
    "agent": Like("an agent that calls tools", Length(1500, 1.5), Length(250, 1.2), rounds=12.0, pause_s=4.0),
    "toolbench": Like(_CALLS, Length(703.79, 0.8), Length(50.39, 0.6), rounds=3.96, pause_s=1.0),
    "gaia": Like("an assistant", Length(6161.02, 1.2), Length(528.76, 1.0), rounds=11.32, pause_s=5.0),
    "hotpotqa": Like(_THREE, Length(1569.8, 0.4), Length(80.03, 0.6), rounds=3.0, steady=True, pause_s=0.3),
    "dureader": Like(_THREE, Length(3081.23, 0.4), Length(150.1, 0.6), rounds=3.0, steady=True, pause_s=0.3),
    "spikes": _phased("ten times the chat, 5 s of a minute", Phase(55, 4, *_CHAT), Phase(5, 40, *_CHAT)),
    "inversion": _phased("a minute reads, the next one writes", Phase(60, 5, *_READ), Phase(60, 8, *_WRITE)),
    "tails": _phased("a few prompts and answers have most of the tokens", Phase(60, 8, *_TAILS)),
})  # fmt: skip


def lognormal_parameters(mean: float, cv: float) -> tuple[float, float]:
    """Return the mean and the deviation of the logarithm, of a lognormal by its own mean and CV."""
    variance = math.log1p(cv**2)
    return math.log(mean) - variance / 2, math.sqrt(variance)


def is_like(source: str) -> bool:
    """Tell whether a trace's name says that it is to be made."""
    return source.startswith(LIKE_PREFIX)


def has_sessions(source: str) -> bool:
    """Tell whether ``like:NAME`` has sessions, whose starts an arrival process gives. Raises TraceError."""
    return _parsed(source)[0].rounds > 1


@lru_cache(maxsize=8)
def make_like(source: str) -> Workload:
    """Return the traffic of ``like:NAME[:COUNT[:SEED]]``; the same text gives the same requests.

    An empty COUNT is the default one. It counts sessions where NAME has several rounds, whose ``arrival_s``
    is then the time since their session's start; else requests, at a mean of one per second. Raises
    TraceError for an unknown name or a count that is none.
    """
    like, count, seed = _parsed(source)
    arrivals, lengths = (np.random.default_rng(each) for each in np.random.SeedSequence(seed).spawn(2))
    if like.rounds > 1:
        return _sessions(like, count, arrivals, lengths)
    if like.phases:
        return _in_phases(like.phases, count, arrivals, lengths)
    shape = 1.0 / like.gaps_cv**2
    times_s = np.cumsum(arrivals.gamma(shape, 1.0 / shape, count))
    return Workload(times_s - times_s[0], like.new.draw(lengths, count), like.output.draw(lengths, count))


def _in_phases(
    phases: tuple[Phase, ...], count: int, arrivals: np.random.Generator, lengths: np.random.Generator
) -> Workload:
    parts: list[tuple[Floats, Integers, Integers]] = []
    begin_s, made, at = 0.0, 0, 0
    while made < count:
        phase = phases[at % len(phases)]
        coming = int(arrivals.poisson(phase.rate_rps * phase.seconds))
        times_s = begin_s + np.sort(arrivals.uniform(0.0, phase.seconds, coming))
        parts.append((times_s, phase.new.draw(lengths, coming), phase.output.draw(lengths, coming)))
        begin_s, made, at = begin_s + phase.seconds, made + coming, at + 1
    times, new, output = (np.concatenate(column)[:count] for column in zip(*parts, strict=True))
    return Workload(times - times[0], new, output)


def _sessions(
    like: Like, count: int, arrivals: np.random.Generator, lengths: np.random.Generator
) -> Workload:
    more = like.rounds - 1.0
    rounds = 1 + (np.full(count, round(more)) if like.steady else arrivals.poisson(more, count))
    total = int(rounds.sum())
    new, output = like.new.draw(lengths, total), like.output.draw(lengths, total)
    pause_s = arrivals.exponential(like.pause_s, total)
    first = np.cumsum(rounds) - rounds
    turn = np.arange(total) - np.repeat(first, rounds)
    session = np.repeat(np.arange(count), rounds)

    def before(values: Floats | Integers) -> Floats:
        """Return for each round the sum of ``values`` over its session's earlier rounds."""
        sums = np.cumsum(values) - values
        return np.asarray(sums - sums[first][session], np.float64)

    history = before(new + output).astype(np.int64)
    waited_s = np.where(turn > 0, pause_s, 0.0)
    workload = Workload(
        waited_s + before(waited_s + ANSWER_S_PER_TOKEN * output),
        history + new,
        output,
        session_id=array("session_id", [f"s{number}" for number in session.tolist()]),
        turn=turn,
        delay_s=np.where(turn > 0, pause_s, np.nan),
    )
    return with_prefixes(workload, history)


def _parsed(source: str) -> tuple[Like, int, int]:
    name, *numbers = source.removeprefix(LIKE_PREFIX).split(":")
    like = LIKES.get(name)
    if like is None:
        raise TraceError(f"no traffic is called {name!r}; there is {', '.join(LIKES)}", file=source)
    count, seed = [*numbers, "", ""][:2]
    if len(numbers) > 2 or not all(text.isdecimal() or not text for text in (count, seed)) or count == "0":
        raise TraceError("expected like:NAME, like:NAME:COUNT or like:NAME:COUNT:SEED", file=source)
    return like, int(count or like.count), int(seed or 0)
