"""The lines of a journal, one struct per type, for the writer and the reader.

A journal is JSONL: one object per line, in the order in which they were written; the key ``type`` says
which struct a line is. Attributes carry the unit in their name; where the key on disk is another one, its
field names that key. Lines of type ``outcome`` make the journal a trace.

What readers can do without has a default. A value of UNSET, and any default of a struct with
``omit_defaults``, is left out on disk; None is written as null.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import UNSET, Struct, UnsetType, field

from tidegate.core.errors import STATUS, ClientError, ClientGone
from tidegate.core.session import History
from tidegate.core.slo import Slo

REFUSALS = frozenset(
    row.label for error, row in STATUS.items() if issubclass(error, ClientError) and error is not ClientGone
)
"""Outcomes of requests that were wrong in themselves: no system could have served them."""


class JournalLine(Struct, tag_field="type"):
    """One line; ``t_s`` is in seconds since the journal began."""

    t_s: float = field(name="t")


class InstanceLabel(Struct):
    """An instance and its role when the journal began."""

    id: str = ""
    role: str = ""


class HeaderLine(JournalLine, tag="header"):
    """The first line: who wrote the journal, and the cluster at that instant.

    ``started_unix_s`` is the wall time at ``t`` 0; a simulation writes 0. A gateway that is restarted with
    the same journal writes another one; its ``t`` goes on.
    """

    t_s: float = field(default=0.0, name="t")
    version: str = ""
    system: str = ""
    started_unix_s: float = 0.0
    slo: Slo | None = None
    instances: list[InstanceLabel] = field(default_factory=list)


class InstanceLine(JournalLine, tag="instance", omit_defaults=True):
    """``event`` is ``up``, with the role it was given; ``starting``, with the role it is to have and why;
    ``start_failed``, ``down``, ``draining`` or ``undrained``, with why.

    One that starts has no name yet, nor one that failed to. ``start_s`` is the time from ``starting`` to
    ``up``, of an instance that was asked for.
    """

    instance: str
    event: str
    role: str = ""
    reason: str = ""
    start_s: float | UnsetType = UNSET


class ProfileLine(JournalLine, tag="profile"):
    """What was observed differs: from here on the instance's prefills and decode steps are predicted to take
    so many times as long as before."""

    instance: str
    prefill: float
    step: float


class Chosen(Struct, kw_only=True):
    """What a decision chose: a placement, or the reason why the request is held or rejected.

    ``decode_on`` is None while the decode's placement waits for the end of the prefill. ``read_from`` is the
    instance whose KV of earlier turns the prefill begins with.
    """

    prefill_on: str | UnsetType = UNSET
    decode_on: str | UnsetType | None = UNSET
    path: str | UnsetType = UNSET
    read_from: str | UnsetType = UNSET
    hold: str | UnsetType = UNSET
    reject: str | UnsetType = UNSET


class DecisionLine(JournalLine, tag="decision"):
    """A decision on one request: what was chosen, among what, at which predicted cost.

    ``kind`` is ``place_prefill``, ``place_decode`` or ``replay``.
    Each alternative is ``{"instance": .., term: value, ...}``, the best one first. ``predicted`` is about the
    chosen instance and has the unit in its keys. ``history`` is what is held of the prompt by the instance to
    which the request's session is bound.
    """

    request: str
    kind: str
    chosen: Chosen
    alternatives: Sequence[Mapping[str, str | float | None]] = field(default_factory=list)
    predicted: Mapping[str, float | None] | None = None
    reason: str = ""
    history: History | UnsetType = UNSET

    @property
    def label(self) -> str:
        """What a count of decisions calls it: ``reject``, ``hold`` or its ``kind``."""
        if self.chosen.reject is not UNSET:
            return "reject"
        return "hold" if self.chosen.hold is not UNSET else self.kind


class FlipLine(JournalLine, tag="flip", omit_defaults=True):
    """A role label was rewritten. ``reason`` is a word that counts go by, ``why`` says it to a person."""

    instance: str
    from_role: str = field(name="from")
    to_role: str = field(name="to")
    reason: str = ""
    why: str = ""


class ControlLine(JournalLine, tag="control", omit_defaults=True):
    """A controller gave another reason than before; ``flips`` counts the flips it asked for, legal or not."""

    reason: str
    flips: int
    controller: str = ""


class ExpectedSeries(Struct, array_like=True):
    """What came of a series in a period, and what was expected of it: the mean, the 0.1 and the 0.9 quantile;
    null where nothing was known. ``source`` said so; another one was asked where ``reason`` says why not."""

    observed: float | None
    mean: float | None
    low: float | None
    high: float | None
    source: str
    reason: str = ""


class ForecastLine(JournalLine, tag="forecast"):
    """A period of the load has ended: what had been expected of it when it began, and what came."""

    period_s: float
    series: dict[str, ExpectedSeries]


class MigrationLine(JournalLine, tag="migration"):
    """A running decode moves.

    ``event`` is ``begun``, ``done``, or, for the reason in ``detail``, ``cancelled`` or ``ignored``. One that
    is done moved ``moved_bytes`` of KV in ``stages`` copies, for the last of which the decode stood; its
    client waited for ``pause_s``.
    """

    request: str
    event: str
    src: str = field(name="from")
    dst: str = field(name="to")
    reason: str = ""
    detail: str = ""
    moved_bytes: int = 0
    stages: int | UnsetType = UNSET
    pause_s: float | UnsetType = UNSET


class SessionLine(JournalLine, tag="session", omit_defaults=True):
    """What became of what is held of a session.

    ``event`` is ``bound`` to an instance, whose KV of the conversation has ``tokens`` tokens, or ``moved``
    there with a request; ``expired`` (nobody is expected to go on), ``evicted``, or ``lost`` with its
    instance. Of a turn it is ``rebuilt``: ``tokens`` of its prompt that an earlier one had were computed
    again, for the reason in ``detail`` if one is known; ``shortened``: its prompt contradicts the history,
    and has only ``tokens`` in common with it; or ``overlaps``: it came before the answer to another.
    """

    session: str
    event: str
    tokens: int = 0
    instance: str = ""
    request: str = ""
    tenant: str = ""
    detail: str = ""


class FailureLine(JournalLine, tag="failure"):
    """An engine failed a leg after ``generated`` tokens; ``reason`` is the error's metric label."""

    request: str
    instance: str
    stage: str
    message: str
    reason: str
    generated: int


class LoadDriftLine(JournalLine, tag="load_drift"):
    """An engine's own numbers began to differ from the ledger's, or agree again.

    ``kind`` is ``requests`` or ``kv`` (more on the engine than known: ``lasting`` is what placements see of
    it) or ``missing`` (less). ``ledger`` and ``engine`` are the two numbers, in requests or tokens. ``event``
    is ``begun`` or ``ended``.
    """

    instance: str
    kind: str
    event: str
    ledger: int | None = None
    engine: int | None = None
    lasting: int = 0


class InputRequest(Struct, kw_only=True, omit_defaults=True):
    """A request as the control plane saw it with an input: what was left to compute and to generate."""

    id: str
    generated: int
    prompt_tokens: int
    max_tokens: int
    arrival_s: float
    slo: Slo | None = None
    tenant: str = ""
    session: str = ""
    turn: int = 0
    priority: int = 0


class InputLine(JournalLine, tag="input", kw_only=True):
    """What a driver told the control plane: the ``verb`` called at ``now_s``, exact, on the driver's clock.

    Only a gateway that is told to writes them (``serve --journal-inputs``); ``decide_again`` reads them.
    """

    verb: str
    now_s: float
    request: InputRequest | None = None
    args: dict[str, Any] = field(default_factory=dict)


class PredictedLength(Struct, array_like=True):
    """What was predicted of an answer once it had ``at_token`` tokens: how many were left, and by whom."""

    at_token: int
    remaining_tokens: float
    source: str


class OutcomeLine(JournalLine, tag="outcome", kw_only=True):
    """The end of one request, at ``t_s``; it arrived at ``timestamp_ms`` since the journal began.

    ``outcome`` is ``ok`` or the metric label of an error. ``migrations`` counts moves of a running decode.
    ``stages_s`` holds seconds by stage (see ``tidegate.core.stages``). ``predicted_lengths`` are those of its
    placements, and of the moments when its tokens had doubled.
    """

    t_s: float = field(default=0.0, name="t")
    request: str = ""
    timestamp_ms: float = field(name="timestamp")
    input_tokens: int = field(default=0, name="input_length")
    output_tokens: int = field(default=0, name="output_length")
    outcome: str = "unnamed"
    status: int | None = None
    error: str | None = None
    finish_reason: str | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None
    stages_s: dict[str, float] = field(default_factory=dict, name="stages")
    prefill_on: str | None = None
    decode_on: str | None = None
    predicted_prefill_s: float | None = None
    observed_prefill_s: float | None = None
    cached_tokens: int = 0
    kv_transfer_bytes: int = 0
    replays: int = 0
    migrations: int = 0
    slo: Slo | None = None
    attained: bool | None = None
    session_id: str | UnsetType = UNSET
    tenant: str | UnsetType = UNSET
    unmovable: str | UnsetType = UNSET
    read_back_tokens: int | UnsetType = UNSET
    predicted_lengths: list[PredictedLength] | UnsetType = UNSET

    @property
    def ok(self) -> bool:
        return self.outcome == "ok"

    @property
    def refused(self) -> bool:
        """Tell whether the request itself was wrong; such requests are not scored."""
        return self.outcome in REFUSALS

    @property
    def arrival_s(self) -> float:
        """When the request arrived, in seconds since the journal began."""
        return self.timestamp_ms / 1000.0

    @property
    def end_s(self) -> float:
        """When the request ended, in seconds since the journal began."""
        return self.t_s or self.arrival_s + (self.e2e_s or 0.0)

    @property
    def decoded_on(self) -> str | None:
        """Where the decode ran: on the prefill's instance, unless it was placed elsewhere."""
        return self.decode_on or self.prefill_on


LINES: dict[str, type[JournalLine]] = {
    str(line.__struct_config__.tag): line for line in JournalLine.__subclasses__()
}
"""The structs by the ``type`` of their lines."""
