"""Running decodes that a pool control moves: the ledger's and the journal's part of it."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Fleet

from tidegate.core.decision import Migrate
from tidegate.dataplane.cluster import Cluster
from tidegate.dataplane.sequence import Sequence
from tidegate.journal.writer import JournalWriter
from tidegate.ledger.ledger import Ledger
from tidegate.sim.flight import Flight
from tidegate.sim.reports import StepReports


class Migrator:
    """Begins migrations and books how they end; ``done`` counts those that were carried through."""

    def __init__(
        self,
        cluster: Cluster,
        ledger: Ledger,
        reports: StepReports,
        flights: Mapping[int, Flight],
        ids: Fleet[str],
        journal: JournalWriter,
    ) -> None:
        self.done = 0
        self._cluster = cluster
        self._ledger = ledger
        self._reports = reports
        self._flights = flights
        self._ids = ids
        self._index = {name: i for i, name in enumerate(ids)}
        self._journal = journal
        self._under_way: dict[int, Migrate] = {}

    def begin(self, migrate: Migrate, now: float) -> None:
        """Have a decode move; one that cannot is left alone, with the reason in the journal."""
        flight = self._flight(migrate.request)
        why_not = self._why_not(flight, migrate)
        if flight is not None and not why_not:
            src, dst = self._index[migrate.src], self._index[migrate.dst]
            if self._cluster.begin_migration(flight.index, src, dst, now):
                self._under_way[flight.index] = migrate
                self._note(migrate, "begun", now)
                return
            why_not = "it is not in a batch there, or the destination has no room"
        self._note(migrate, "ignored", now, why_not)

    def instance_down(self, instance: int, now: float) -> None:
        """Call off what moves to an instance that dies."""
        for index, migrate in list(self._under_way.items()):
            if migrate.dst == self._ids[instance]:
                self._cluster.cancel_migration(index, now)

    def aborted(self, flight: Flight) -> None:
        """Forget the migration of a request whose leg was aborted, if there is one."""
        self._under_way.pop(flight.index, None)

    def paused(self, sequence: Sequence) -> None:
        """See ``Listener.paused``."""
        flight = self._flights[sequence.request]
        self._reports.tell(flight.on)
        self._ledger.left_step(flight.request.id)

    def migrated(
        self, sequence: Sequence, src: int, dst: int, moved_bytes: int, committed: bool, now: float
    ) -> None:
        """See ``Listener.migrated``."""
        migrate = self._under_way.pop(sequence.request)
        flight = self._flights.get(sequence.request)
        if flight is not None:
            flight.kv_transfer_bytes += moved_bytes
            if committed:
                self._commit(flight, sequence, dst, now)
        self._note(migrate, "done" if committed else "cancelled", now, moved_bytes=moved_bytes)

    def _commit(self, flight: Flight, sequence: Sequence, dst: int, now: float) -> None:
        request_id = flight.request.id
        self.done += 1
        flight.migrations += 1
        flight.on = flight.decode_on = dst
        self._ledger.decode_dispatched(request_id, self._ids[dst], sequence.tokens, now)
        self._ledger.transfer_ended(request_id, now)

    def _flight(self, request_id: str) -> Flight | None:
        number = request_id[1:]
        return self._flights.get(int(number)) if number.isdigit() else None

    def _why_not(self, flight: Flight | None, migrate: Migrate) -> str:
        if flight is None:
            return "it has ended"
        up = self._ledger.ids
        if migrate.src not in up or migrate.dst not in up:
            return "one of the instances is not up"
        if flight.index in self._under_way:
            return "it moves already"
        if not flight.decoding or flight.on != self._index[migrate.src]:
            return f"it does not decode on {migrate.src}"
        return ""

    def _note(self, migrate: Migrate, event: str, now: float, detail: str = "", moved_bytes: int = 0) -> None:
        if self._journal.enabled:
            self._journal.migration(now, migrate, event, detail, moved_bytes)
