"""What a load client records of each request, and the JSONL file it leaves.

A result file has one ``bench`` line (how the run was made), one ``request`` line per request in
order of completion, and one ``summary`` line when the run ended in order. It is also a trace: its
``request`` lines carry ``timestamp`` (ms), ``input_length`` and ``output_length`` as offered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from dataclasses import field as field_of
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct, field, to_builtins

from tidegate.core.errors import TraceError
from tidegate.core.slo import Slo
from tidegate.journal.reader import RecordedLines

PART = ".part"
"""Ends the name of a file whose run is not over."""

Status = Literal["ok", "http", "timeout", "connection", "stream", "interrupted"]


class RequestResult(Struct, frozen=True, tag_field="type", tag="request"):
    """One request as its client saw it; times in seconds but for ``scheduled_ms``.

    ``scheduled_ms`` and ``sent_s`` (actual) count from the start of the run; ``ttft_s`` and ``e2e_s``
    from the *scheduled* arrival, so that a client that falls behind cannot flatter the server. ``tpot_s``
    is (last token - first token)/(tokens - 1), None for one token. ``itl_p99_s`` and ``itl_max_s`` are
    over the gaps between tokens, ``counted_tokens`` of which came in events that said how many they held,
    or in events of their own; 0 in files without it. ``status`` is ``http`` for an error status,
    ``stream`` for an answer that broke off or carried an error, ``interrupted`` when the client was
    stopped first; interrupted requests are not scored.
    """

    index: int
    scheduled_ms: float = field(name="timestamp")
    input_tokens: int = field(name="input_length")
    max_tokens: int = field(name="output_length")
    status: Status
    sent_s: float
    http_status: int | None = None
    error: str = ""
    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None
    itl_p99_s: float | None = None
    itl_max_s: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int = 0
    counted_tokens: int = 0
    finish_reason: str | None = None
    session_id: str = ""
    turn: int = 0
    slo_class: str = ""

    @property
    def arrival_s(self) -> float:
        """Return when it was scheduled, in seconds since the start of the run."""
        return self.scheduled_ms / 1000.0

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def outcome(self) -> str:
        """Return the status as a short label, ``http 429`` where there is a code."""
        return f"http {self.http_status}" if self.status == "http" else self.status

    def to_json(self) -> dict[str, Any]:
        """Return the ``request`` line, without what is unknown."""
        return {key: value for key, value in to_builtins(self).items() if value is not None and value != ""}


@dataclass(frozen=True, slots=True)
class Targets:
    """What the requests of a run are scored by: ``classes`` those of a class, ``slo`` the others."""

    slo: Slo
    classes: Mapping[str, Slo] = field_of(default_factory=dict)

    def of(self, result: RequestResult) -> Slo:
        """Return the targets of a request."""
        return self.classes.get(result.slo_class, self.slo)

    def to_json(self) -> dict[str, Any]:
        """Return the keys of a ``bench`` line that have them."""
        classes = {name: asdict(slo) for name, slo in self.classes.items()}
        return {"slo": asdict(self.slo)} | ({"slo_classes": classes} if classes else {})

    @classmethod
    def recorded(cls, header: Mapping[str, Any]) -> Targets:
        """Read them from a ``bench`` line."""
        own, classes = header.get("slo"), header.get("slo_classes") or {}
        return cls(Slo(**own) if isinstance(own, dict) else Slo(), {n: Slo(**c) for n, c in classes.items()})


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
    lines = RecordedLines[Any](path, {"bench": dict, "request": RequestResult, "summary": dict})
    found = list(lines)
    results = sorted((one for one in found if isinstance(one, RequestResult)), key=lambda one: one.index)
    others = {one["type"]: one for one in found if isinstance(one, dict)}
    if "bench" not in others:
        raise TraceError("this is not a bench result: it has no 'bench' line", file=str(path), line=1)
    return ResultFile(others["bench"], results, others.get("summary"), lines.truncated)
