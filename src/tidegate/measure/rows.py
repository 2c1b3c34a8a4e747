"""The journal's rows, built in one place for all who write one. ``tidegate.measure.journal`` reads them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import orjson

from tidegate.core.decision import Flip, Hold, Migrate, Place, Reject, Verdict
from tidegate.core.errors import TidegateError, status_of
from tidegate.core.instance import Role
from tidegate.core.slo import Slo

ALTERNATIVES = 8
"""How many alternatives of a placement are written."""

Row = dict[str, Any]


@dataclass(slots=True)
class Story:
    """What happened to a request: the journal's outcome row in the making. Times are the driver's clock."""

    arrival_s: float
    first_token_s: float | None = None
    last_token_s: float | None = None
    prefill_on: str | None = None
    decode_on: str | None = None
    predicted_prefill_s: float | None = None
    observed_prefill_s: float | None = None
    cached_tokens: int = 0
    kv_transfer_bytes: int = 0
    replays: int = 0
    migrations: int = 0
    stages: dict[str, float] = field(default_factory=dict)
    read_back_tokens: int = 0
    """Tokens of earlier rounds whose KV the prefill took from where they were decoded."""
    unmovable: str = ""
    """The field of the request whose state no other engine can take up; "" when it can move."""

    @property
    def ttft_s(self) -> float | None:
        """Arrival to the first token handed to the client's connection."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    def tpot_s(self, output_tokens: int) -> float | None:
        """Mean time per token after the first; None for fewer than two tokens."""
        if self.first_token_s is None or self.last_token_s is None or output_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Ending:
    """How a request ended, and what it was."""

    request: str
    slo: Slo
    prompt_tokens: int
    output_tokens: int
    finish_reason: str | None
    error: TidegateError | None
    end_s: float
    session: str = ""
    tenant: str = ""

    @property
    def outcome(self) -> str:
        """``ok`` or the error's metric label."""
        return "ok" if self.error is None else status_of(self.error).label

    def attained(self, story: Story) -> bool:
        """Tell whether the request was answered within its targets."""
        ttft_s = story.ttft_s
        if self.error is not None or ttft_s is None:
            return False
        return self.slo.attained(ttft_s, story.tpot_s(self.output_tokens))


def outcome_row(story: Story, ending: Ending, started_s: float) -> Row:
    """Return the row of a request's end; ``started_s`` is when the journal began."""
    error = ending.error
    optional = {
        name: value
        for name, value in (
            ("session_id", ending.session),
            ("tenant", ending.tenant),
            ("unmovable", story.unmovable),
            ("read_back_tokens", story.read_back_tokens),
        )
        if value
    }
    return {
        "request": ending.request,
        "timestamp": round((story.arrival_s - started_s) * 1000.0, 3),
        "input_length": ending.prompt_tokens,
        "output_length": ending.output_tokens,
        "outcome": ending.outcome,
        "status": 200 if error is None else status_of(error).http,
        "error": None if error is None else error.message,
        "finish_reason": ending.finish_reason,
        "ttft_s": _rounded(story.ttft_s),
        "tpot_s": _rounded(story.tpot_s(ending.output_tokens)),
        "e2e_s": _rounded(ending.end_s - story.arrival_s),
        "stages": {name: _rounded(value) for name, value in story.stages.items()},
        "prefill_on": story.prefill_on,
        "decode_on": story.decode_on,
        "predicted_prefill_s": _rounded(story.predicted_prefill_s),
        "observed_prefill_s": _rounded(story.observed_prefill_s),
        "cached_tokens": story.cached_tokens,
        "kv_transfer_bytes": story.kv_transfer_bytes,
        "replays": story.replays,
        "migrations": story.migrations,
        "slo": {"ttft_s": ending.slo.ttft_s, "tpot_s": ending.slo.tpot_s},
        "attained": ending.attained(story),
        **optional,
    }


def decision_row(request_id: str, kind: str, verdict: Verdict, predicted: dict[str, float] | None) -> Row:
    """Return the row of a verdict, with its best alternatives and what is predicted for the chosen one."""
    match verdict.decision:
        case Place() as place:
            chosen: Row = {
                "prefill_on": place.prefill_on,
                "decode_on": place.decode_on,
                "path": place.path.value,
            }
        case Hold(reason):
            chosen = {"hold": reason}
        case Reject(reason):
            chosen = {"reject": reason}
    return {
        "request": request_id,
        "kind": kind,
        "chosen": chosen,
        "alternatives": verdict.alternatives.top(ALTERNATIVES) if verdict.alternatives else [],
        "predicted": predicted,
        "reason": verdict.reason,
    }


def flip_row(flip: Flip, before: Role) -> Row:
    """Return the row of a label that was rewritten."""
    return {"instance": flip.instance, "from": before.label, "to": flip.to.label, "reason": flip.reason}


def migration_row(migrate: Migrate, event: str, detail: str, moved_bytes: int) -> Row:
    """Return the row of a migration begun, done, cancelled or, as ``detail`` says, ignored."""
    return {
        "request": migrate.request,
        "event": event,
        "from": migrate.src,
        "to": migrate.dst,
        "reason": migrate.reason,
        "detail": detail,
        "moved_bytes": moved_bytes,
    }


def encode_row(kind: str, t_s: float, row: Row) -> bytes:
    """Return the line, without its end, of a row of type ``kind`` at ``t_s`` since the journal began.

    One that is not clean JSON (say, a peer's odd bytes) loses those, not the line.
    """
    line = {"type": kind, "t": round(t_s, 6), **row}
    try:
        return orjson.dumps(line)
    except TypeError:
        return json.dumps(line, default=str, ensure_ascii=False).encode("utf-8", "replace")


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
