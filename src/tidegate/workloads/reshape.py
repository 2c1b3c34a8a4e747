"""Other traffic from a workload: copies, spikes, drift of the phase mix, other draws, several traces as one.

Unlike ``scale_rate``, which compresses time, ``replicate`` and ``spikes`` keep the day's shape. They decide
per session (a request without one is its own): its turns are kept, copied or dropped with its first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy as np

from tidegate.core.errors import ConfigError
from tidegate.workloads.trace import Floats, Workload, optional

DEFAULT_JITTER_S = 2.0
"""Longest delay of a copy: short beside a minute's rate, long beside the gaps inside a burst."""
PERMUTED_WITHIN_S = 60.0
DRIFT_FORMS = "linear:FROM:TO:OVER_S or sine:FACTOR:PERIOD_S"
Drift = Callable[[float], float]
"""What the input:output ratio is multiplied by at a time of the trace; positive."""


@dataclass(frozen=True, slots=True)
class Spike:
    """Rate times ``factor`` in ``[start_s, start_s + duration_s)``, again every ``period_s`` if given.

    A factor below 1 is a dip. Raises ConfigError for values that make no spike.
    """

    factor: float
    start_s: float
    duration_s: float
    period_s: float | None = None

    def __post_init__(self) -> None:
        sizes_ok = 0 <= self.factor < math.inf and 0 <= self.start_s < math.inf and self.duration_s > 0
        if not (sizes_ok and (self.period_s is None or self.duration_s <= self.period_s < math.inf)):
            raise ConfigError(
                "a spike needs FACTOR >= 0, START >= 0, DURATION > 0 and PERIOD >= DURATION, got "
                f"{self.factor}:{self.start_s}:{self.duration_s}:{self.period_s}"
            )

    @classmethod
    def parse(cls, text: str) -> Spike:
        """Read ``FACTOR:START:DURATION[:PERIOD]`` (seconds); raises ConfigError."""
        try:
            factor, start_s, duration_s, *period_s = map(float, text.split(":"))
            (period,) = period_s or (None,)
        except ValueError:
            raise ConfigError(
                f"spike {text!r}: expected FACTOR:START_S:DURATION_S[:PERIOD_S] as in '4:600:60:1800'"
            ) from None
        return cls(factor, start_s, duration_s, period)

    def end_s(self, at_s: float) -> float | None:
        """Return when the spike that is on at ``at_s`` ends, or None outside of one."""
        since_s = at_s - self.start_s
        if since_s < 0:
            return None
        begun_s = since_s if self.period_s is None else since_s % self.period_s
        return at_s + self.duration_s - begun_s if begun_s < self.duration_s else None


def replicate(
    workload: Workload, factor: float, *, seed: int, jitter_s: float = DEFAULT_JITTER_S
) -> Workload:
    """Multiply the rate by ``factor`` on the same clock.

    Below 1, each session stays with that probability, and any that stays with a smaller factor of one seed
    stays with a larger. Above, every session stays, and ``factor - 1`` copies of it on average come
    up to ``jitter_s`` later. Copy k of all sessions is a population of its own: it shares prefixes within
    itself exactly as the original does, and none with the original. Steps that follow one another
    need different seeds to keep their copies apart.
    """
    if not 0 < factor < math.inf:
        raise ConfigError(f"the rate factor must be positive, got {factor}")
    return _multiplied(workload, lambda _: (factor, math.inf), jitter_s, seed)


def spikes(workload: Workload, spike: Spike, *, seed: int, jitter_s: float = DEFAULT_JITTER_S) -> Workload:
    """Multiply the rate of sessions that start within the spike, as ``replicate`` does; leave the rest.

    A copy starts before its spike ends; its later turns may come after.
    """

    def rate(at_s: float) -> tuple[float, float]:
        end_s = spike.end_s(at_s)
        return (1.0, math.inf) if end_s is None else (spike.factor, end_s)

    return _multiplied(workload, rate, jitter_s, seed)


def _multiplied(
    workload: Workload, rate: Callable[[float], tuple[float, float]], jitter_s: float, seed: int
) -> Workload:
    """Repeat each session as often as ``rate(start) -> (factor, copies start before)`` says on average."""
    if not 0 <= jitter_s < math.inf:
        raise ConfigError(f"the jitter must be 0 s or more, got {jitter_s}")
    rng = np.random.default_rng(seed)
    units = workload.units()
    delays_s: list[list[float]] = []
    for start_s in workload.arrival_s[np.unique(units, return_index=True)[1]].tolist():
        factor, before_s = rate(start_s)
        delays_s.append(_delays_s(rng, factor, min(jitter_s, before_s - start_s)))
    times = np.fromiter(map(len, delays_s), np.int64, len(delays_s))
    parts, rows = [], []
    for copy in range(times.max(initial=0)):
        chosen = np.flatnonzero(times[units] > copy)
        delay_s = np.array([unit[copy] if len(unit) > copy else 0.0 for unit in delays_s])
        part = workload[chosen]
        part = replace(part, arrival_s=part.arrival_s + delay_s[units[chosen]])
        parts.append(renamed(part, f"{seed}.{copy}") if copy else part)
        rows.append(chosen)
    if not parts:
        return workload[:0]
    together = Workload.joined(parts)
    # At one instant in the order of the input, copies after their original.
    return together[np.lexsort((np.concatenate(rows), together.arrival_s))]


def _delays_s(rng: np.random.Generator, factor: float, jitter_s: float) -> list[float]:
    """Return a delay for each appearance of a session; the original is undelayed."""
    count = int(factor) + (1 if rng.random() < factor % 1.0 else 0)
    return [0.0, *rng.uniform(0.0, jitter_s, max(0, count - 1)).tolist()][:count]


def renamed(workload: Workload, label: str) -> Workload:
    """Give the requests new session and client names and block ids; equal names and ids stay equal.

    ``label`` marks the copy, as in ``a~label/agent_1``; two labels never give one id.
    """
    suffix = f"~{label}"
    ids = _Ids(label)
    sessions, clients, blocks = workload.session_id, workload.client_id, workload.hash_ids
    if sessions is not None:
        parts = (name.partition("/") for name in sessions)
        sessions = optional("session_id", [a and f"{a}{suffix}{slash}{b}" for a, slash, b in parts])
    if clients is not None:
        clients = optional("client_id", [name and name + suffix for name in clients])
    if blocks is not None:
        blocks = optional("hash_ids", [tuple([ids[i] for i in row]) for row in blocks])
    return replace(workload, session_id=sessions, client_id=clients, hash_ids=blocks)


class _Ids(dict[int, int]):
    """New ids by old one, made on first use and kept, so that rows share the number objects."""

    def __init__(self, label: str) -> None:
        super().__init__()
        self._label = label

    def __missing__(self, old: int) -> int:
        digest = blake2b(f"{self._label}\0{old}".encode(), digest_size=8).digest()
        # 62 bits fit every reader's signed integer.
        new = self[old] = int.from_bytes(digest, "little") >> 2
        return new


def apart(workloads: Iterable[Workload]) -> list[Workload]:
    """Return the workloads such that none shares a session, client or block with another.

    The first keeps its names; the others are renamed by their position.
    """
    return [renamed(one, f"t{k}") if k else one for k, one in enumerate(workloads)]


def superpose(*workloads: Workload) -> Workload:
    """Merge workloads by arrival, each on its own clock from 0; their sessions and prefixes stay distinct.

    Every input must be in order of arrival; the output is.
    """
    together = Workload.joined(apart(workloads))
    return together[together.arrival_s.argsort(kind="stable")]


def concatenate(*workloads: Workload, gap_s: float = 0.0) -> Workload:
    """Put workloads one after the other: each starts ``gap_s`` after the last arrival of the one before.

    Sessions and prefixes of different workloads stay distinct. Raises ConfigError for a negative gap.
    """
    if not gap_s >= 0:
        raise ConfigError(f"the gap between traces must be 0 s or more, got {gap_s}")
    start_s, last_s = 0.0, 0.0
    parts = []
    for one in apart(workloads):
        parts.append(replace(one, arrival_s=one.arrival_s + start_s))
        if one:
            last_s = float(parts[-1].arrival_s[-1])
        start_s = last_s + gap_s
    return Workload.joined(parts)


def linear_drift(start: float, end: float, over_s: float) -> Drift:
    """Return a straight line from ``start`` at 0 to ``end`` at ``over_s``, constant from there on."""
    if not all(0 < value < math.inf for value in (start, end, over_s)):
        raise ConfigError(f"a linear drift needs positive FROM, TO and OVER_S, got {start}:{end}:{over_s}")
    return lambda at_s: start + (end - start) * min(1.0, at_s / over_s)


def sine_drift(swing: float, period_s: float) -> Drift:
    """Return a sine of the logarithm, between ``1/swing`` and ``swing``, that rises from 1 at time 0."""
    if not all(0 < value < math.inf for value in (swing, period_s)):
        raise ConfigError(f"a sine drift needs a positive FACTOR and PERIOD_S, got {swing}:{period_s}")
    return lambda at_s: float(swing ** math.sin(2.0 * math.pi * at_s / period_s))


def parse_drift(text: str) -> Drift:
    """Read ``linear:0.5:2:3600`` or ``sine:2:1800``; raises ConfigError."""
    kind, *numbers = text.split(":")
    try:
        match kind, list(map(float, numbers)):
            case "linear", [start, end, over_s]:
                return linear_drift(start, end, over_s)
            case "sine", [swing, period_s]:
                return sine_drift(swing, period_s)
    except ValueError:
        pass
    raise ConfigError(f"drift {text!r}: expected {DRIFT_FORMS}")


def drift_mix(workload: Workload, drift: Drift) -> Workload:
    """Multiply each request's input:output ratio by ``drift(arrival)``, rounded to whole tokens.

    Arrivals stay, and so does ``input + output`` of every request, hence the rate of tokens. Both parts
    keep at least one token. Prefix ids are kept as far as the old and the new prompt have whole blocks.
    """
    factor = np.array([drift(at_s) for at_s in workload.arrival_s.tolist()])
    moved = factor != 1.0
    old = workload.input_tokens
    total = old + workload.output_tokens
    weighted = old * factor
    ideal = np.rint(total * weighted / (weighted + workload.output_tokens)).astype(np.int64)
    inputs = np.where(moved, np.minimum(total - 1, np.maximum(1, ideal)), old)
    blocks = workload.hash_ids
    if blocks is not None:
        kept = np.minimum(inputs, old) // workload.column("block_tokens")
        rows = zip(blocks, moved.tolist(), kept.tolist(), strict=True)
        blocks = optional("hash_ids", [ids[:whole] if cut else ids for ids, cut, whole in rows])
    return replace(workload, input_tokens=inputs, output_tokens=total - inputs, hash_ids=blocks)


def reseeded(workload: Workload, seed: int) -> Workload:
    """Return the trace as another day might have had it: who asks what is permuted within each minute.

    Seed 0 is the trace itself. Another seed permutes the requests among the arrival times of their
    minute: lengths, prefixes and clients move together, arrivals stay as they are. A session moves as a
    whole: its turns keep their offsets from its first. Same seed, same result. Raises ConfigError for
    a negative seed.
    """
    if seed < 0:
        raise ConfigError(f"a seed must be 0 or more, got {seed}")
    if seed == 0:
        return workload
    units = workload.units()
    first = np.unique(units, return_index=True)[1]
    starts_s = workload.arrival_s[first]
    arrival_s = _permuted(starts_s, seed)[units] + (workload.arrival_s - starts_s[units])
    # At one instant, earlier sessions come first.
    order = np.lexsort((units, arrival_s))
    return replace(workload, arrival_s=arrival_s)[order]


def _permuted(starts_s: Floats, seed: int) -> Floats:
    """Return the starts with those of one minute permuted among each other."""
    rng = np.random.default_rng(seed)
    minutes = np.floor(starts_s / PERMUTED_WITHIN_S)
    # Sorted by minute, in the original and in a random order: rank for rank, one takes the other's start.
    ordered = np.argsort(minutes, kind="stable")
    shuffled = rng.permutation(len(starts_s))
    shuffled = shuffled[np.argsort(minutes[shuffled], kind="stable")]
    result = np.empty_like(starts_s)
    result[ordered] = starts_s[shuffled]
    return result
