"""What a load client records of each request, and the JSONL file it leaves.

A result file has one ``bench`` line (how the run was made), one ``request`` line per request in
order of completion, and one ``summary`` line when the run ended in order. It is also a trace: its
``request`` lines carry ``timestamp`` (ms), ``input_length`` and ``output_length`` as offered.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tidegate.core.errors import TraceError
from tidegate.measure.lines import Fields, TypedLines

Status = Literal["ok", "http", "timeout", "connection", "stream", "interrupted"]


@dataclass(frozen=True, slots=True)
class RequestResult:
    """One request as its client saw it; times in seconds.

    ``arrival_s`` (scheduled) and ``sent_s`` (actual) count from the start of the run; ``ttft_s`` and
    ``e2e_s`` from the *scheduled* arrival, so that a client that falls behind cannot flatter the
    server. ``tpot_s`` is (last token - first token)/(tokens - 1), None for one token. ``itl_p99_s``
    and ``itl_max_s`` are over the gaps between chunks. ``status`` is ``http`` for an error status,
    ``stream`` for an answer that broke off or carried an error, ``interrupted`` when the client was
    stopped first; interrupted requests are not scored.
    """

    index: int
    arrival_s: float
    sent_s: float
    input_tokens: int
    max_tokens: int
    status: Status
    http_status: int | None = None
    error: str = ""
    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None
    itl_p99_s: float | None = None
    itl_max_s: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int = 0
    finish_reason: str | None = None
    session_id: str = ""
    turn: int = 0

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def outcome(self) -> str:
        """Return the status as a short label, ``http 429`` where there is a code."""
        return f"http {self.http_status}" if self.status == "http" else self.status

    def to_json(self) -> dict[str, Any]:
        """Return the ``request`` line."""
        line: dict[str, Any] = {
            "type": "request",
            "index": self.index,
            "timestamp": round(self.arrival_s * 1000.0, 3),
            "input_length": self.input_tokens,
            "output_length": self.max_tokens,
            "status": self.status,
            "sent_s": self.sent_s,
        }
        for name in _OPTIONAL:
            value = getattr(self, name)
            if value is not None and value != "":
                line[name] = value
        return line

    @classmethod
    def from_fields(cls, line: Fields) -> RequestResult:
        """Read a ``request`` line; raises TraceError for a missing or mistyped field."""
        status = line.text("status")
        if status not in _STATUSES:
            raise line.error("status", f"status is {status!r}, expected one of {', '.join(_STATUSES)}")
        return cls(
            index=line.require_integer("index"),
            arrival_s=line.require_number("timestamp") / 1000.0,
            sent_s=line.require_number("sent_s"),
            input_tokens=line.require_integer("input_length"),
            max_tokens=line.require_integer("output_length"),
            status=status,
            http_status=line.integer("http_status"),
            error=line.text("error"),
            ttft_s=line.number("ttft_s"),
            tpot_s=line.number("tpot_s"),
            e2e_s=line.number("e2e_s"),
            itl_p99_s=line.number("itl_p99_s"),
            itl_max_s=line.number("itl_max_s"),
            prompt_tokens=line.integer("prompt_tokens"),
            output_tokens=line.integer("output_tokens") or 0,
            finish_reason=line.text("finish_reason") or None,
            session_id=line.text("session_id"),
            turn=line.integer("turn") or 0,
        )


_STATUSES: tuple[Status, ...] = ("ok", "http", "timeout", "connection", "stream", "interrupted")
_OPTIONAL = (
    "http_status", "error", "ttft_s", "tpot_s", "e2e_s", "itl_p99_s", "itl_max_s",
    "prompt_tokens", "output_tokens", "finish_reason", "session_id", "turn",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ResultFile:
    """A bench result read back; ``summary`` is None when the client was killed."""

    header: dict[str, Any]
    results: list[RequestResult]
    summary: dict[str, Any] | None
    truncated: bool


def read_results(path: str | Path) -> ResultFile:
    """Read a bench result file; raises TraceError for anything else.

    Half a last line is tolerated and reported as ``truncated``.
    """
    lines = TypedLines(path)
    header: dict[str, Any] | None = None
    summary: dict[str, Any] | None = None
    results: list[RequestResult] = []
    for line in lines:
        if line.kind == "bench":
            header = line.value
        elif line.kind == "request":
            results.append(RequestResult.from_fields(line))
        elif line.kind == "summary":
            summary = line.value
    if header is None:
        raise TraceError("this is not a bench result: it has no 'bench' line", file=str(path), line=1)
    results.sort(key=lambda result: result.index)
    return ResultFile(header, results, summary, lines.truncated)
