"""What an engine says of its load against what the ledger believes: the difference that lasts.

An engine and a ledger never agree to the request: some are on their way in, others on their way out, and
KV blocks are filled in part. So a difference counts once several readings in a row show it, and then by the
least that all of them show. It is believed in one direction only. What an engine has beyond the ledger is
somebody else's, or leaked, and is in the way of placements. What it lacks is reported and left in the book:
an engine that lost a request looks idle, and must not draw others for it.
"""

from __future__ import annotations

import enum
import math
from collections import deque
from dataclasses import dataclass

from tidegate.ledger.records import Booked

READINGS = 3
"""How many readings in a row must show a surplus (ours): legs begin and end within one."""
MISSING_READINGS = 10
"""How many must lack requests (ours): during one long step an engine has nothing new to tell."""
REQUESTS_SHARE = 0.1
"""The share of the ledger's requests that may be on their way in or out at a reading (ours)."""
KV_SHARE = 0.02
"""The share of an engine's KV that may be in use without explanation (ours)."""
PREFILL_ROOM = 2
"""How many times its estimate a prefill's KV may take (ours): only engines count a text's tokens."""


class Difference(enum.StrEnum):
    """Ways in which an engine and the ledger differ; labels of metrics and journal rows."""

    REQUESTS = "requests"
    """The engine has requests that the ledger does not know."""
    KV = "kv"
    """The engine uses KV that no request in the ledger explains, nor ended ones that keep it."""
    MISSING = "missing"
    """The ledger has requests there that the engine does not know."""


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """An engine's own numbers at one reading; None for what it does not tell."""

    requests: int | None
    kv_tokens: int | None


@dataclass(frozen=True, slots=True)
class LoadDrift:
    """A difference that began to last, or, with ``lasting`` 0, that is over. In requests or tokens of KV."""

    kind: Difference
    ledger: int | None
    engine: int | None
    lasting: int


class Lasting:
    """The part of a surplus that each of the last readings shows.

    Once there is one, half the tolerance is enough for it to go on, so that noise does not end and renew it.
    """

    __slots__ = ("_recent", "level")

    def __init__(self, readings: int) -> None:
        self._recent: deque[int] = deque(maxlen=readings)
        self.level = 0

    def see(self, surplus: int | None, tolerance: int) -> None:
        """Take a reading; None when there was none to take, which ends what lasted."""
        if surplus is None:
            self._recent.clear()
        else:
            enough = surplus > (tolerance // 2 if self.level else tolerance)
            self._recent.append(surplus if enough else 0)
        self.level = min(self._recent) if len(self._recent) == self._recent.maxlen else 0


class Reconciler:
    """Compares readings of one engine with the ledger, from its start on.

    After each ``compare``, ``foreign_requests`` and ``foreign_tokens`` are what ``Ledger.foreign_load`` is to
    be told.
    """

    def __init__(self, kv_capacity_tokens: int, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._kv_tolerance = math.ceil(kv_capacity_tokens * KV_SHARE)
        self._kv_in_use = Lasting(READINGS)
        self._drifts = {
            Difference.REQUESTS: Lasting(READINGS),
            Difference.KV: Lasting(READINGS),
            Difference.MISSING: Lasting(MISSING_READINGS),
        }

    @property
    def foreign_requests(self) -> int:
        """Requests on the engine beyond the ledger's."""
        return self._drifts[Difference.REQUESTS].level

    @property
    def foreign_tokens(self) -> int:
        """KV in use beyond the ledger's; that which ended requests keep takes room, though it is no drift."""
        return self._kv_in_use.level

    def compare(
        self, before: Booked, after: Booked, told: EngineLoad, kept_tokens: int = 0
    ) -> list[LoadDrift]:
        """Take a reading; return the drifts that began or ended with it.

        ``before`` and ``after`` are the ledger's words around the reading, ``kept_tokens`` the KV that
        ended requests are known to keep pinned.
        """
        most, least = max(before.requests, after.requests), min(before.requests, after.requests)
        explained = max(self._most_kv(before), self._most_kv(after))
        under_way = math.ceil(most * REQUESTS_SHARE)
        in_use = None if told.kv_tokens is None else max(0, told.kv_tokens - explained)
        self._kv_in_use.see(in_use, self._kv_tolerance)
        return [
            *self._see(Difference.REQUESTS, most, told.requests, 1, under_way),
            *self._see(Difference.KV, explained + kept_tokens, told.kv_tokens, 1, self._kv_tolerance),
            *self._see(Difference.MISSING, least, told.requests, -1, under_way),
        ]

    def unheard(self) -> list[LoadDrift]:
        """Forget what readings showed: nobody can confirm it any more. Returns the drifts that ended."""
        self._kv_in_use.see(None, 0)
        return [drift for kind in Difference for drift in self._see(kind, None, None, 1, 0)]

    def _see(
        self, kind: Difference, ledger: int | None, engine: int | None, sign: int, tolerance: int
    ) -> list[LoadDrift]:
        lasting = self._drifts[kind]
        was = lasting.level
        surplus = None if ledger is None or engine is None else max(0, sign * (engine - ledger))
        lasting.see(surplus, tolerance)
        changed = (lasting.level > 0) != (was > 0)
        return [LoadDrift(kind, ledger, engine, lasting.level)] if changed else []

    def _most_kv(self, booked: Booked) -> int:
        """Return the most KV that the ledger's own requests may have in use, in tokens of whole blocks."""
        tokens = booked.decode_tokens + booked.handoff_tokens + PREFILL_ROOM * booked.prefill_tokens
        return tokens + booked.requests * self._block_tokens
