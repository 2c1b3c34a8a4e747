"""The journal: what a gateway or a simulation writes of a run, and how it is read back.

JSONL, one object per line, told apart by ``type``. Times are seconds; ``t`` counts from the start of
the journal and ``timestamp`` is in milliseconds. Absent and null fields are alike. Lines stand in
the order in which they were written; ``outcome`` lines make the journal a trace. Readers ignore
kinds and fields they do not know.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from tidegate.core.errors import STATUS, ClientError, ClientGone, TraceError
from tidegate.core.slo import Slo
from tidegate.core.stages import STAGES
from tidegate.measure.lines import Fields, TypedLines

REFUSALS = frozenset(
    row.label for error, row in STATUS.items() if issubclass(error, ClientError) and error is not ClientGone
)
"""Outcomes of requests that were wrong in themselves: no system could have served them."""


class SloLine(TypedDict):
    """Latency targets."""

    ttft_s: float
    tpot_s: float


class HeaderLine(TypedDict):
    """First line: who wrote the journal, and the cluster at that instant."""

    type: Literal["header"]
    version: str
    system: str
    started_unix_s: float
    slo: SloLine
    instances: list[dict[str, str]]  # {"id": .., "role": ..}


class InstanceLine(TypedDict):
    """An instance came, went or restarted."""

    type: Literal["instance"]
    t: float
    instance: str
    event: Literal["up", "down", "restart"]
    role: NotRequired[str]
    reason: NotRequired[str]


class DecisionLine(TypedDict):
    """A decision on one request: what was chosen, among what, at which predicted cost.

    ``chosen`` is ``{"prefill_on", "decode_on", "path"}``, ``{"reject": reason}`` or ``{"hold": reason}``;
    each alternative is ``{"instance": .., term: value, ...}``.
    """

    type: Literal["decision"]
    t: float
    request: str
    kind: Literal["place_prefill", "place_decode", "replay"]
    chosen: dict[str, Any]
    alternatives: NotRequired[list[dict[str, Any]]]
    predicted: NotRequired[dict[str, float]]
    reason: NotRequired[str]


# The functional form, because ``from`` is a keyword.
FlipLine = TypedDict(
    "FlipLine",
    {
        "type": Literal["flip"],
        "t": float,
        "instance": str,
        "from": str,
        "to": str,
        "reason": NotRequired[str],
    },
)


class LoadDriftLine(TypedDict):
    """An engine's own numbers began to differ from the ledger's, or agree again.

    ``kind`` is ``requests`` or ``kv`` (more on the engine than known: ``lasting`` is what placements see of
    it) or ``missing`` (less). ``ledger`` and ``engine`` are the two numbers, in requests or tokens.
    """

    type: Literal["load_drift"]
    t: float
    instance: str
    kind: Literal["requests", "kv", "missing"]
    event: Literal["begun", "ended"]
    ledger: NotRequired[int | None]
    engine: NotRequired[int | None]
    lasting: int


class OutcomeLine(TypedDict):
    """The end of one request. ``t`` is when it ended, ``timestamp`` when it arrived.

    ``outcome`` is ``ok`` or the metric label of an error. ``migrations`` counts moves of a running
    decode. ``stages`` holds seconds by stage.
    """

    type: Literal["outcome"]
    t: float
    request: str
    timestamp: float
    input_length: int
    output_length: int
    outcome: str
    status: int
    session_id: NotRequired[str | None]
    tenant: NotRequired[str | None]
    finish_reason: NotRequired[str | None]
    ttft_s: NotRequired[float | None]
    tpot_s: NotRequired[float | None]
    e2e_s: NotRequired[float | None]
    stages: NotRequired[dict[str, float | None]]
    prefill_on: NotRequired[str | None]
    decode_on: NotRequired[str | None]
    predicted_prefill_s: NotRequired[float | None]
    observed_prefill_s: NotRequired[float | None]
    cached_tokens: NotRequired[int | None]
    kv_transfer_bytes: NotRequired[int | None]
    replays: NotRequired[int]
    migrations: NotRequired[int]
    slo: NotRequired[SloLine]
    attained: NotRequired[bool]


@dataclass(frozen=True, slots=True)
class FlipEvent:
    """A role label was rewritten."""

    t_s: float
    instance: str
    from_role: str
    to_role: str
    reason: str


@dataclass(frozen=True, slots=True)
class InstanceEvent:
    """An instance came, went or restarted."""

    t_s: float
    instance: str
    event: str
    role: str
    reason: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """One ``outcome`` line; ``decode_on`` falls back to ``prefill_on`` (local decode)."""

    request: str
    end_s: float
    arrival_s: float
    input_tokens: int
    output_tokens: int
    outcome: str
    status: int | None
    ttft_s: float | None
    tpot_s: float | None
    e2e_s: float | None
    stages_s: dict[str, float]
    prefill_on: str
    decode_on: str
    predicted_prefill_s: float | None
    observed_prefill_s: float | None
    cached_tokens: int
    kv_transfer_bytes: int
    replays: int
    migrations: int
    slo: Slo | None

    @property
    def ok(self) -> bool:
        return self.outcome == "ok"

    @property
    def refused(self) -> bool:
        """Tell whether the request itself was wrong; such requests are not scored."""
        return self.outcome in REFUSALS


@dataclass(slots=True)
class Journal:
    """A journal read into memory, decisions reduced to counts."""

    system: str = ""
    version: str = ""
    slo: Slo | None = None
    roles: dict[str, str] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    flips: list[FlipEvent] = field(default_factory=list)
    instance_events: list[InstanceEvent] = field(default_factory=list)
    decisions: Counter[str] = field(default_factory=Counter)
    unfinished: int = 0
    last_t_s: float = 0.0
    truncated: bool = False


def read_journal(path: str | Path) -> Journal:
    """Read a journal; raises TraceError for broken or mistyped lines.

    Half a last line, as a killed gateway leaves it, is tolerated and noted in ``truncated``.
    ``unfinished`` counts requests with a decision but no outcome.
    """
    lines = TypedLines(path)
    journal = Journal()
    decided: set[str] = set()
    ended: set[str] = set()
    seen_header = False
    for line in lines:
        journal.last_t_s = max(journal.last_t_s, line.number("t") or 0.0)
        match line.kind:
            case "header":
                seen_header = True
                _take_header(journal, line)
            case "outcome":
                outcome = _outcome(line)
                journal.outcomes.append(outcome)
                ended.add(outcome.request)
            case "decision":
                journal.decisions[_decision_label(line)] += 1
                decided.add(line.text("request"))
            case "flip":
                journal.flips.append(_flip(line))
            case "instance":
                journal.instance_events.append(_instance_event(line))
    if not seen_header:
        raise TraceError("this is not a journal: it has no 'header' line", file=str(path), line=1)
    journal.unfinished = len(decided - ended)
    journal.truncated = lines.truncated
    return journal


def _take_header(journal: Journal, line: Fields) -> None:
    journal.system, journal.version, journal.slo = line.text("system"), line.text("version"), line.slo()
    for instance in line.objects("instances"):
        journal.roles[instance.text("id")] = instance.text("role")


def _decision_label(line: Fields) -> str:
    chosen = line.object("chosen").value
    verdict = next((name for name in ("reject", "hold") if name in chosen), "")
    return verdict or line.text("kind") or "unnamed"


def _flip(line: Fields) -> FlipEvent:
    return FlipEvent(
        t_s=line.require_number("t"),
        instance=line.text("instance"),
        from_role=line.text("from"),
        to_role=line.text("to"),
        reason=line.text("reason"),
    )


def _instance_event(line: Fields) -> InstanceEvent:
    return InstanceEvent(
        t_s=line.require_number("t"),
        instance=line.text("instance"),
        event=line.text("event"),
        role=line.text("role"),
        reason=line.text("reason"),
    )


def _outcome(line: Fields) -> Outcome:
    stages = line.object("stages")
    by_stage = {name: stages.number(name) for name in STAGES}
    arrival_s = line.require_number("timestamp") / 1000.0
    e2e_s = line.number("e2e_s")
    end_s = line.number("t")
    prefill_on = line.text("prefill_on")
    return Outcome(
        request=line.text("request"),
        end_s=arrival_s + (e2e_s or 0.0) if end_s is None else end_s,
        arrival_s=arrival_s,
        input_tokens=line.integer("input_length") or 0,
        output_tokens=line.integer("output_length") or 0,
        outcome=line.text("outcome") or "unnamed",
        status=line.integer("status"),
        ttft_s=line.number("ttft_s"),
        tpot_s=line.number("tpot_s"),
        e2e_s=e2e_s,
        stages_s={name: seconds for name, seconds in by_stage.items() if seconds is not None},
        prefill_on=prefill_on,
        decode_on=line.text("decode_on") or prefill_on,
        predicted_prefill_s=line.number("predicted_prefill_s"),
        observed_prefill_s=line.number("observed_prefill_s"),
        cached_tokens=line.integer("cached_tokens") or 0,
        kv_transfer_bytes=line.integer("kv_transfer_bytes") or 0,
        replays=line.integer("replays") or 0,
        migrations=line.integer("migrations") or 0,
        slo=line.slo(),
    )
