"""The writer of journals, live or simulated: what happened becomes a line, and a line becomes bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import msgspec

from tidegate.core.decision import Flip, Hold, Migrate, Place, Reject, Verdict
from tidegate.core.errors import EngineError, status_of
from tidegate.core.instance import Role
from tidegate.core.load_forecast import LoadForecast, SeriesForecast
from tidegate.core.migration import MigrationCost
from tidegate.core.request import Request
from tidegate.core.slo import Slo
from tidegate.journal.schema import (
    Chosen,
    ControlLine,
    DecisionLine,
    ExpectedSeries,
    FailureLine,
    FlipLine,
    ForecastLine,
    HeaderLine,
    InstanceLabel,
    InstanceLine,
    JournalLine,
    MigrationLine,
)

ALTERNATIVES = 8
"""How many alternatives of a placement are written."""


class JournalWriter:
    """Appends a line per event, each ending in a newline, by calling ``append``.

    ``now_s`` of every method is on the clock that showed ``started_s`` when the journal began. Without
    ``append``, ``enabled`` is False and nothing is written; callers look at ``enabled`` before they compute
    something for a line. Lines of equal content are equal bytes.
    """

    def __init__(self, append: Callable[[bytes], object] | None, started_s: float = 0.0) -> None:
        self.enabled = append is not None
        self.started_s = started_s
        self._append = append

    def elapsed_s(self, now_s: float) -> float:
        """Return ``now_s`` as lines carry it: since the journal began, to the microsecond."""
        return round(now_s - self.started_s, 6)

    def write(self, line: JournalLine) -> None:
        """Append a line; its ``t_s`` is counted since the journal began."""
        if self.enabled and self._append is not None:
            self._append(encode_line(line) + b"\n")

    def header(
        self,
        *,
        version: str,
        system: str,
        slo: Slo,
        roles: Iterable[tuple[str, Role]],
        now_s: float | None = None,
        now_unix_s: float | None = None,
    ) -> None:
        """Write the first line of a run, which begins ``now_s``, else with the journal; ``roles`` are the
        instances' ids and labels."""
        instances = [InstanceLabel(name, role.label) for name, role in roles]
        t_s = 0.0 if now_s is None else self.elapsed_s(now_s)
        started_unix_s = 0.0 if now_unix_s is None else now_unix_s - t_s
        self.write(HeaderLine(t_s, version, system, started_unix_s, slo, instances))

    def instance(
        self,
        now_s: float,
        instance: str,
        event: str,
        *,
        role: str = "",
        reason: str = "",
        start_s: float | None = None,
    ) -> None:
        """Write what became of an instance (see ``InstanceLine``)."""
        took_s = msgspec.UNSET if start_s is None else round(start_s, 6)
        self.write(InstanceLine(self.elapsed_s(now_s), instance, event, role, reason, took_s))

    def decision(
        self, now_s: float, request: Request, kind: str, verdict: Verdict, predicted: dict[str, float] | None
    ) -> None:
        """Write a verdict, with its best alternatives and what is predicted for the chosen one.

        ``kind`` is ``place_prefill``, ``place_decode`` or ``replay``.
        """
        match verdict.decision:
            case Place() as place:
                chosen = Chosen(prefill_on=place.prefill_on, decode_on=place.decode_on, path=place.path.value)
                chosen.read_from = place.read_from or msgspec.UNSET
            case Hold(reason):
                chosen = Chosen(hold=reason)
            case Reject(reason):
                chosen = Chosen(reject=reason)
        best = verdict.alternatives.top(ALTERNATIVES) if verdict.alternatives else []
        t_s = self.elapsed_s(now_s)
        history = request.history or msgspec.UNSET
        self.write(DecisionLine(t_s, request.id, kind, chosen, best, predicted, verdict.reason, history))

    def flip(self, now_s: float, flip: Flip, before: Role, why: str) -> None:
        """Write that an instance's label was rewritten; ``before`` is the one it had, ``why`` a sentence."""
        t_s = self.elapsed_s(now_s)
        self.write(FlipLine(t_s, flip.instance, before.label, flip.to.label, flip.reason, why))

    def control(self, now_s: float, controller: str, reason: str, flips: int) -> None:
        """Write the reason of a controller's decision and how many flips it asked for."""
        self.write(ControlLine(self.elapsed_s(now_s), reason, flips, controller))

    def forecast(self, now_s: float, expected: LoadForecast, observed: Mapping[str, float]) -> None:
        """Write what was expected of the period of the load that ended, and what came, by series."""
        series = {
            name: ExpectedSeries(
                _known(value),
                _known(found.mean[0]),
                _known(found.low[0]),
                _known(found.high[0]),
                found.source,
                found.reason,
            )
            for name, value in observed.items()
            for found in (cast(SeriesForecast, getattr(expected, name)),)
        }
        self.write(ForecastLine(self.elapsed_s(now_s), expected.period_s, series))

    def migration(self, now_s: float, migrate: Migrate, event: str, detail: str, cost: MigrationCost) -> None:
        """Write that a migration has begun, is done, or, as ``detail`` says why, cancelled or ignored."""
        move = (migrate.src, migrate.dst, migrate.reason)
        pause_s = msgspec.UNSET if cost.pause_s is None else round(cost.pause_s, 6)
        costs = (cost.moved_bytes, cost.stages or msgspec.UNSET, pause_s)
        self.write(MigrationLine(self.elapsed_s(now_s), migrate.request, event, *move, detail, *costs))

    def failure(self, now_s: float, request: str, error: EngineError, generated: int) -> None:
        """Write that an engine failed a request's leg, after ``generated`` tokens of the answer."""
        t_s, reason = self.elapsed_s(now_s), status_of(error).label
        self.write(FailureLine(t_s, request, error.instance, error.stage, error.message, reason, generated))


_ENCODER = msgspec.json.Encoder()


def encode_line(line: JournalLine) -> bytes:
    """Return a line's JSON without its end.

    What is not clean JSON (say, a peer's odd bytes in a header) loses those bytes, not the line.
    """
    try:
        return _ENCODER.encode(line)
    except (TypeError, UnicodeEncodeError):
        plain: Any = msgspec.to_builtins(line, enc_hook=_plain)
        return json.dumps(plain, ensure_ascii=False).encode("utf-8", "replace")


def _known(value: float) -> float | None:
    return round(float(value), 4) if math.isfinite(value) else None


def _plain(value: object) -> float | str:
    return float(value) if isinstance(value, float) else str(value)
