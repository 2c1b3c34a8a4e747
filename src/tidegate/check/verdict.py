"""What a probe found, and the report of a whole check."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TypeVar

from tidegate.engines.seam import Json

T = TypeVar("T")


class CheckVerdict(enum.StrEnum):
    """RED has to be changed. The gateway works around YELLOW, or nothing shows it to outsiders. SKIPPED was
    not probed, because something else failed first."""

    GREEN = "green"
    YELLOW = "yellow"
    RED = "red"
    SKIPPED = "skipped"


GREEN, YELLOW, RED, SKIPPED = CheckVerdict


@dataclass(frozen=True, slots=True)
class Finding:
    """One probe's verdict: what was ``observed`` ``where``, and what to ``change``.

    ``where`` is empty for the fleet, has one id for a server, and two for an ordered pair: the first one
    holds the KV, the second one takes it.
    """

    probe: str
    where: tuple[str, ...]
    verdict: CheckVerdict
    observed: str
    change: str = ""


@dataclass(slots=True)
class CheckReport:
    """All findings, in the order in which probes ran. ``servers`` describes the checked servers by id."""

    servers: dict[str, Json]
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether nothing that is required failed or could not be probed."""
        return not any(found.verdict in (RED, SKIPPED) for found in self.findings)

    def counts(self) -> Mapping[CheckVerdict, int]:
        """Return how many findings there are of each verdict."""
        return Counter(found.verdict for found in self.findings)

    def to_json(self) -> Json:
        """Return the report as ``--json`` prints it."""
        return {
            "ok": self.ok,
            "seconds": round(self.seconds, 3),
            "servers": self.servers,
            "findings": [asdict(found) for found in self.findings],
        }


def shared_start(answers: Sequence[list[int]]) -> list[int]:
    """Return the tokens with which all answers begin."""
    shared: list[int] = []
    for tokens in zip(*answers, strict=False):
        if len(set(tokens)) > 1:
            break
        shared.append(tokens[0])
    return shared


def common_value(values: Mapping[str, T]) -> T:
    """Return the value that most servers have; at a tie the first server's. ``values`` is not empty."""
    each = list(values.values())
    return max(each, key=each.count)
