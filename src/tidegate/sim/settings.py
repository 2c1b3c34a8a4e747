"""How a simulation runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from tidegate.core.errors import ConfigError
from tidegate.core.request import Request
from tidegate.core.slo import Slo
from tidegate.dataplane.replica import Replica
from tidegate.signals.forecast.choice import check_source
from tidegate.signals.forecast.feed import PERIOD_S, STEPS
from tidegate.signals.lengths.choice import SIMULATED, checked
from tidegate.workloads.trace import TraceRecord


@dataclass(frozen=True, slots=True)
class SimSettings:
    """How the control plane runs.

    ``front_s`` passes between the dispatch of a leg and its arrival in the engine's queue: of every leg, so
    that a request whose decode is a leg of its own spends it twice, once before its first token and once
    after, and a replay spends it again. ``deadline_s`` bounds how long a request may be held.
    ``leap`` jumps over steps between two changes of a batch; without it every step is an event. Nothing else
    depends on it (see ``tidegate.dataplane.stretch``).

    ``slo`` is that of requests without a class; the others have theirs in ``slo_classes``. With
    ``closed_loop`` a turn waits for its session's previous answer (see ``TraceArrivals``).

    With ``heartbeat_s`` > 0 the control plane knows of steps only as of the last heartbeat (see
    ``SimDriver.stepped``). An instance comes up at its time in ``starts_s``, at 0 without one, dies at those
    in ``deaths`` and returns, empty, at those in ``returns``; a request is replayed elsewhere at most
    ``replays`` times (the gateway's default). One in ``slowed`` takes that many times as long for every step
    as its profile says, and the control plane is not told. ``admission`` is the gateway's setting of that
    name, here off: a simulation says what a system does with every request. ``shares`` are
    weights of the trace's clients (see ``TenantShares``).

    The last ``spares`` instances are not up at the start; a controller that adds instances has them join
    ``start_delay_s`` later (the time that a server takes to load a model), those for decode
    ``decode_start_delay_s``, by default half as much again (DOPD: a decode instance captures graphs).

    With ``prefix_hits`` prefills are priced with what each instance's prefix cache is expected to hold.
    ``lengths`` names the source of length predictions (see ``tidegate.signals.lengths.choice``); "" is none,
    or for a system that needs one ``hidden``. ``forecast`` names the source of forecasts of the load, by
    periods of ``forecast_period_s`` (see ``tidegate.signals.forecast.choice``); "" is none, or for a system
    that needs one ``ensemble``. Forecasts go ``forecast_steps`` periods ahead.
    """

    slo: Slo = field(default_factory=Slo)
    front_s: float = 0.0
    deadline_s: float = 600.0
    leap: bool = True
    slo_classes: Mapping[str, Slo] = field(default_factory=dict)
    closed_loop: bool = False
    heartbeat_s: float = 0.0
    starts_s: Mapping[str, float] = field(default_factory=dict)
    deaths: Sequence[tuple[float, str]] = ()
    returns: Sequence[tuple[float, str]] = ()
    replays: int = 5
    slowed: Mapping[str, float] = field(default_factory=dict)
    admission: float = 0.0
    shares: Mapping[str, float] = field(default_factory=dict)
    spares: int = 0
    start_delay_s: float = 30.0
    decode_start_delay_s: float | None = None
    prefix_hits: bool = True
    lengths: str = ""
    forecast: str = ""
    forecast_period_s: float = PERIOD_S
    forecast_steps: int = STEPS

    def __post_init__(self) -> None:
        if not (0 <= self.front_s < float("inf") and 0 < self.deadline_s < float("inf")):
            raise ConfigError("front-end time and deadline must be positive numbers of seconds")
        if not all(0 <= seconds < float("inf") for seconds in (self.heartbeat_s, *self.start_delays_s)):
            raise ConfigError("the heartbeat and the start delay must be numbers of seconds of at least 0")
        if self.lengths:
            checked(self.lengths, SIMULATED)
        if self.forecast:
            check_source(self.forecast)
        if not 0 < self.forecast_period_s < float("inf") or self.forecast_steps < 1:
            raise ConfigError("forecasts need periods of a positive number of seconds, and one at least")
        if self.spares < 0:
            raise ConfigError(f"spares must be a count of at least 0, got {self.spares}")

    @property
    def start_delays_s(self) -> tuple[float, float]:
        """What a spare takes to come up for prefill and for decode."""
        decode_s = self.decode_start_delay_s
        return self.start_delay_s, 1.5 * self.start_delay_s if decode_s is None else decode_s

    @property
    def loosest_slo(self) -> Slo:
        """The targets that no request's are looser than."""
        every = (self.slo, *self.slo_classes.values())
        return Slo(max(slo.ttft_s for slo in every), max(slo.tpot_s for slo in every))

    def slo_of(self, record: TraceRecord, number: int) -> Slo:
        """Return the targets of request ``number``'s class. Raises ConfigError for an unknown class."""
        slo = self.slo_classes.get(record.slo_class)
        if slo is None:
            known = ", ".join(sorted(self.slo_classes)) or "none"
            raise ConfigError(
                f"request {number}: it names the SLO class {record.slo_class!r}; known classes: {known}"
            )
        return slo

    def request(
        self, name: str, record: TraceRecord, number: int, arrival_s: float, context_tokens: int
    ) -> Request:
        """Return what is asked for by record ``number``, whose answer has ``output_tokens``.

        Traces do not say which limit a client set: it is what the longest context leaves.
        """
        return Request(
            name,
            record.input_tokens,
            max(record.output_tokens, context_tokens - record.input_tokens),
            arrival_s,
            self.slo_of(record, number) if record.slo_class else self.slo,
            record.client_id,
            record.session_id,
            record.turn,
        )

    def real(self, replica: Replica) -> Replica:
        """Return what an instance is, where it is not what its profile says."""
        factor = self.slowed.get(replica.instance.id)
        if factor is None:
            return replica
        return replace(replica, profile=replica.profile.scaled(factor, factor))
