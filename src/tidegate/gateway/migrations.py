"""Decodes that move while they run: who asks for it, what becomes of it, and what the journal says."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Protocol

from tidegate.core.clock import Clock
from tidegate.core.decision import Migrate
from tidegate.gateway.metrics import Metrics
from tidegate.journal.writer import JournalWriter
from tidegate.ledger.ledger import Ledger


class Movable(Protocol):
    """A request in flight."""

    def leave(self, migrate: Migrate) -> str:
        """Move as told, at the next token; return why not, "" when it will."""
        ...


class Migrations:
    """Passes migrations on to the flights they are about."""

    def __init__(
        self,
        flights: Mapping[str, Movable],
        ledger: Ledger,
        clock: Clock,
        journal: JournalWriter,
        metrics: Metrics,
    ) -> None:
        self._flights = flights
        self._ledger = ledger
        self._clock = clock
        self._journal = journal
        self._metrics = metrics

    def begin(self, migrate: Migrate) -> bool:
        """Have a decode move; one that cannot is left alone, with the reason in the journal."""
        flight = self._flights.get(migrate.request)
        if flight is None:
            why_not = "it has ended"
        elif migrate.src == migrate.dst or migrate.dst not in self._ledger.ids:
            why_not = f"{migrate.dst} is no other instance that is up"
        else:
            why_not = flight.leave(migrate)
        if why_not:
            self.note(migrate, "ignored", why_not)
        return not why_not

    def force(self, rng: random.Random) -> None:
        """Have a random decode move to a random other instance, if any can: a test of statelessness."""
        ids = self._ledger.ids
        for request in rng.sample(sorted(self._flights), len(self._flights)):
            src = self._ledger.owner_of(request)
            others = [name for name in ids if name != src]
            if (
                src is not None
                and others
                and not self._flights[request].leave(Migrate(request, src, rng.choice(others), "forced"))
            ):
                return

    def note(self, migrate: Migrate, event: str, detail: str = "", moved_bytes: int = 0) -> None:
        """Journal a migration that begins, is done, cancelled or ignored."""
        if event != "begun":
            self._metrics.migrations.labels(event).inc()
        if self._journal.enabled:
            self._journal.migration(self._clock.now(), migrate, event, detail, moved_bytes)
