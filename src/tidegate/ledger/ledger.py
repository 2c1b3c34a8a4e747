"""The ledger: events in, Snapshot out. Simulator and gateway keep their books with it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from tidegate.core.errors import InternalError, NoInstance
from tidegate.core.instance import Instance, Role
from tidegate.core.request import Request
from tidegate.costs.profile import Profile, ProfileTable
from tidegate.ledger.integrity import check_integrity
from tidegate.ledger.labels import Labels
from tidegate.ledger.records import Booked, Counts, InstanceEntry, RequestEntry, Residents
from tidegate.ledger.rows import RequestRows
from tidegate.ledger.sessions import SessionBook, SessionRows
from tidegate.ledger.sheet import LedgerMatrix
from tidegate.ledger.snapshot import Field, Snapshot, WindowAverages
from tidegate.ledger.stage_sums import StageSums
from tidegate.ledger.windows import NO_WINDOWS, LongWindows, close_windows

GRID_S = 2.0**-30
"""Predicted prefill times are rounded to this step (about a nanosecond; ours), so that their sums are
exact in floating point, return to zero, and can be compared for equality. Times of tokens are rounded down to
it: a window's gaps have one sum, however many steps were told of at once."""


class Ledger:
    """What is where, fed by events only (Arrow v2, section 5.2: never by scraping engines).

    What an engine says of itself enters only as ``foreign_load``, beside what the ledger knows.

    Every event carries ``now`` in seconds of the driver's clock; times never decrease, but for those of
    tokens, steps and ends of transfers, which may be told late, before the next snapshot. An event costs
    O(1) and changes running sums; only instances coming and going, ``window_closed`` of a stalled
    instance and ``check_integrity`` walk over requests.

    Events about a request that is not live (it ended, or its instance died) change nothing and return
    False, because a driver learns of such ends late.
    """

    def __init__(self, window_s: float = 1.0, windows: Mapping[str, float] = NO_WINDOWS) -> None:
        self._sheet = LedgerMatrix()
        self._stages = StageSums(self._sheet)
        self._windows = LongWindows(window_s, windows)
        self.sessions = SessionBook()
        self._seats: dict[str, InstanceEntry] = {}
        self._entries: dict[str, RequestEntry] = {}
        self._ids: tuple[str, ...] = ()
        self._index: dict[str, int] = {}
        self._costs: ProfileTable | None = None
        self._labels: Labels | None = None
        self._placed_prefills = 0
        self._placed_decodes = 0
        self._finished = 0
        self._aborted = 0
        self._lost = 0
        self._last_flip_to_decode_s = -math.inf
        self._window_start_s = -math.inf

    # Instances

    def instance_up(self, instance: Instance, profile: Profile, role: Role, now: float) -> None:
        """Add ``instance``, empty. Raises InternalError when its id is up already."""
        if instance.id in self._seats:
            raise InternalError(f"instance {instance.id!r} came up twice without going down")
        column = self._sheet.add_column()
        self._seats[instance.id] = InstanceEntry(instance, profile, column)
        cells = self._sheet.matrix[:, column]
        cells[Field.ROLE] = role
        cells[Field.FLIPPABLE] = instance.flippable
        cells[Field.KV_CAPACITY_TOKENS] = instance.kv_capacity_tokens
        cells[Field.FREE_TOKENS] = instance.kv_capacity_tokens or math.inf
        cells[Field.FLIPPED_AT_S] = -math.inf
        self._sheet.queue_since_s[column] = now
        self._windows.add_column()
        self._membership_changed()

    def instance_down(self, instance_id: str, now: float) -> list[str]:
        """Remove the instance; return every request that had work or KV there.

        The driver re-dispatches or ends each of them. Those whose KV is lost are not live any more. Two
        kinds still are, because their KV may live: a request that was to decode here while its KV is
        still at its prefill instance is back to waiting for a decode placement, and a request that
        decodes elsewhere but may not have pulled everything from here keeps decoding there. An unknown
        id returns an empty list.
        """
        seat = self._seats.get(instance_id)
        if seat is None:
            return []
        affected = [*seat.prefills.values(), *seat.decodes.values(), *seat.handoffs.values()]
        for entry in affected:
            if entry.source is seat and entry.decode is not None:
                self._stages.release_source(entry)
                entry.last_at_s = now
            elif entry.decode is seat and entry.source is not None:
                self._stages.leave_decode(entry)
            else:
                self._drop(entry, now)
                self._lost += 1
        self.sessions.instance_down(instance_id)
        del self._seats[instance_id]
        self._sheet.remove_column(seat.column)
        self._windows.remove_column(seat.column)
        for other in self._seats.values():
            if other.column > seat.column:
                other.column -= 1
        self._membership_changed()
        return [entry.request.id for entry in affected]

    def flip(self, instance_id: str, role: Role, now: float) -> bool:
        """Relabel an instance; nothing else changes. False when unknown, not flippable or labelled so."""
        seat = self._seats.get(instance_id)
        if seat is None or not seat.instance.flippable or self._sheet.role[seat.column] == role:
            return False
        self._sheet.role[seat.column] = float(role)
        self._labels = None
        self._sheet.flipped_at_s[seat.column] = now
        if role == Role.DECODE:
            self._last_flip_to_decode_s = now
        return True

    def foreign_load(self, instance_id: str, requests: int, tokens: int) -> bool:
        """Say what is on an instance beside this ledger's requests: others' ``requests``, ``tokens`` of KV.

        Replaces what was said before. Placements see the requests as decodes with that KV, and KV without
        requests as waiting for a pull. It is in no window and no count, and goes with the instance. False
        when that is not up.
        """
        seat = self._seats.get(instance_id)
        if seat is None:
            return False
        sheet, column = self._sheet, seat.column
        resident, held = (tokens, 0) if requests else (0, tokens)
        sheet.decode_requests[column] += requests - seat.foreign_requests
        sheet.decode_tokens[column] += resident - seat.foreign_resident_tokens
        sheet.handoff_tokens[column] += held - seat.foreign_held_tokens
        sheet.free_tokens[column] -= tokens - seat.foreign_resident_tokens - seat.foreign_held_tokens
        seat.foreign_requests = requests
        seat.foreign_resident_tokens, seat.foreign_held_tokens = resident, held
        return True

    # Requests

    def prefill_dispatched(self, request: Request, on: str, now: float) -> float:
        """Queue the request's prefill on instance ``on``; return its predicted seconds T(r, i).

        A live request with the same id is aborted first: a replay supersedes it. Raises NoInstance when
        ``on`` is not up.
        """
        seat = self._seat(on)
        if not (request.id in self._entries and self.aborted(request.id, now)) and request.session:
            self.sessions.began(request, now)
        new = request.tokens_to_compute(on)
        seconds = seat.profile.prefill_s(new, request.prompt_tokens - new)
        seconds = round(seconds / GRID_S) * GRID_S
        entry = RequestEntry(request, seat, seconds)
        self._entries[request.id] = entry
        self._placed_prefills += 1
        seat.prefills[request.id] = entry
        column = seat.column
        self._sheet.prefill_requests[column] += 1
        self._sheet.prefill_tokens[column] += request.prompt_tokens
        self._sheet.prefill_work_s[column] += seconds
        self._sheet.prefill_work_s2[column] += seconds * seconds
        self._stages.change_queue(column, seconds, now)
        if seat.head is None:
            self._stages.set_head(seat, entry, now, seen=False)
        return seconds

    def prefill_started(self, request_id: str, now: float) -> bool:
        """Say that the engine began this prefill.

        Instances prefill one request after another (Arrow v2, section 4.1): where another prefill was
        seen to start and has not ended, that one stays the running one. A driver that cannot see starts
        leaves this out; then the oldest prefill runs from the end of the one before it.
        """
        entry = self._entries.get(request_id)
        if entry is None or entry.prefill is None:
            return False
        if not entry.prefill.head_seen:
            self._stages.set_head(entry.prefill, entry, now, seen=True)
        return True

    def prefill_ended(self, request_id: str, now: float) -> bool:
        """Say that the prompt's KV is complete: it waits on its instance for a decode placement."""
        entry = self._entries.get(request_id)
        if entry is None or entry.prefill is None:
            return False
        seat = entry.prefill
        self._stages.leave_prefill(entry, now)
        self._stages.hold(entry, seat, entry.request.prompt_tokens)
        return True

    def decode_dispatched(self, request_id: str, on: str, resident_tokens: int, now: float) -> bool:
        """Place the decode on instance ``on`` with ``resident_tokens`` of KV (prompt + generated).

        ``tokens`` counts those that come after. Where the KV is elsewhere it stays counted there, too,
        until ``transfer_ended`` or the first ``tokens``. For a request that decodes already this is a
        migration. Raises NoInstance when ``on`` is not up.
        """
        seat = self._seat(on)
        entry = self._entries.get(request_id)
        if entry is None:
            return False
        if entry.prefill is not None:
            self.prefill_ended(request_id, now)
        previous = entry.decode
        if previous is not None:
            held = entry.tokens_now
            self._stages.leave_decode(entry)
            if entry.source is None:
                self._stages.hold(entry, previous, held)
        if entry.source is seat:
            self._stages.release_source(entry)
        entry.decode = seat
        entry.resident_tokens = resident_tokens
        entry.last_at_s = now
        entry.generating = False
        seat.decodes[request_id] = entry
        self._sheet.decode_requests[seat.column] += 1
        self._sheet.decode_tokens[seat.column] += resident_tokens
        self._sheet.free_tokens[seat.column] -= resident_tokens
        self._placed_decodes += 1
        return True

    def transfer_ended(self, request_id: str, now: float) -> bool:
        """Say that the pull ended: the KV leaves the source, and from now on the decode can stall."""
        entry = self._entries.get(request_id)
        if entry is None or entry.decode is None or entry.source is None:
            return False
        self._stages.release_source(entry)
        entry.last_at_s = now
        return True

    def tokens(self, request_id: str, count: int, now: float) -> bool:
        """Count ``count`` tokens that the request's decode instance produced.

        The gap since the last ones enters the instance's window, except before its first ones: that one
        measures the way into the instance (Narwhal; Arrow v2, section 4.3: q2 + c + q3).
        """
        entry = self._entries.get(request_id)
        if entry is None or entry.decode is None:
            return False
        if entry.joined_step is not None:
            self._stages.fall_out(entry)
        now = int(now / GRID_S) * GRID_S
        sheet = self._sheet
        column = entry.decode.column
        sheet.decode_tokens[column] += count
        sheet.free_tokens[column] -= count
        entry.resident_tokens += count
        if entry.generating:
            sheet.gap_sum_s[column] += now - entry.last_at_s
            sheet.gap_tokens[column] += count
        else:
            entry.generating = True
            if entry.source is not None:
                self._stages.release_source(entry)
        entry.last_at_s = now
        return True

    def joined(self, request_id: str) -> bool:
        """Say that a decode, right after a ``tokens`` of it, steps together with others of its instance.

        From now on ``stepped`` counts its tokens. False for a request that is in step already, that has no
        token of this instance yet, or whose last one came at another time than theirs.
        """
        entry = self._entries.get(request_id)
        if entry is None or entry.decode is None or not entry.generating or entry.joined_step is not None:
            return False
        seat = entry.decode
        if seat.in_step and seat.stepped_at_s != entry.last_at_s:
            return False
        seat.stepped_at_s = entry.last_at_s
        seat.in_step += 1
        entry.joined_step = seat.steps
        return True

    def stepped(self, instance_id: str, count: int, now: float) -> None:
        """Count ``count`` tokens of every decode in step on the instance, the last ones at ``now``.

        The same sums as ``tokens`` of each of them, at a cost that does not grow with their number.
        """
        seat = self._seats.get(instance_id)
        if seat is None or not seat.in_step:
            return
        now = int(now / GRID_S) * GRID_S
        sheet, column = self._sheet, seat.column
        tokens = count * seat.in_step
        sheet.decode_tokens[column] += tokens
        sheet.free_tokens[column] -= tokens
        sheet.gap_sum_s[column] += seat.in_step * (now - seat.stepped_at_s)
        sheet.gap_tokens[column] += tokens
        seat.steps += count
        seat.stepped_at_s = now

    def left_step(self, request_id: str) -> bool:
        """Say that a decode in step pauses there (a preemption); ``tokens`` and ``joined`` bring it back."""
        entry = self._entries.get(request_id)
        if entry is None or entry.joined_step is None:
            return False
        self._stages.fall_out(entry)
        return True

    def finished(self, request_id: str, now: float) -> bool:
        """End a request that answered in full; its KV is free. False when it is not live."""
        entry = self._entries.get(request_id)
        if entry is None:
            return False
        request = entry.request
        if request.session:
            held_on = entry.owner.instance.id
            self.sessions.ended(request, held_on, entry.tokens_now or request.prompt_tokens, now)
        self._drop(entry, now)
        self._finished += 1
        return True

    def aborted(self, request_id: str, now: float) -> bool:
        """End a request that failed or was cancelled; its KV is free. False when it is not live."""
        entry = self._entries.get(request_id)
        if entry is None:
            return False
        if entry.request.session:
            self.sessions.ended(entry.request, "", 0, now)
        self._drop(entry, now)
        self._aborted += 1
        return True

    # Time

    def window_closed(self, now: float) -> None:
        """Close the window of inter-token gaps and queue averages, and the longer ones that end with it."""
        sums = close_windows(self._sheet, self._seats.values(), self._window_start_s, now)
        self._windows.add(sums, now - self._window_start_s)
        self._window_start_s = now

    def snapshot(self, now: float) -> Snapshot:
        """Return the cluster as of ``now``: one copy of the matrix, nothing per request."""
        if self._costs is None:  # worked out once, however many instances come at a time
            self._costs = ProfileTable.of([seat.profile for seat in self._seats.values()])
        if self._labels is None:
            self._labels = Labels(self._sheet.matrix[Field.ROLE].copy())
        return Snapshot(
            now,
            self._ids,
            self._index,
            self._costs,
            self._sheet.public.tobytes(),
            self._labels,
            self._placed_prefills,
            self._placed_decodes,
            self._last_flip_to_decode_s,
            self,
        )

    def request_rows(self) -> RequestRows:
        """Return one row per live request, as arrays."""
        return RequestRows.of(list(self._entries.values()))

    def session_rows(self) -> SessionRows:
        """Return one row per session that is remembered, as arrays."""
        return self.sessions.rows(self._index)

    @property
    def windows(self) -> Mapping[str, WindowAverages]:
        """The averages of the named windows that ended last."""
        return self._windows.averages

    # Questions

    @property
    def ids(self) -> tuple[str, ...]:
        """The instances that are up, in the order they came up."""
        return self._ids

    def role_of(self, instance_id: str) -> Role:
        """Return an instance's label. Raises NoInstance when it is not up."""
        return Role(int(self._sheet.role[self._seat(instance_id).column]))

    def residents(self, instance_id: str) -> Residents:
        """Return who is on an instance. Raises NoInstance when it is not up."""
        seat = self._seat(instance_id)
        return Residents(tuple(seat.prefills), tuple(seat.handoffs), tuple(seat.decodes))

    def in_step(self, instance_id: str) -> list[str]:
        """Return the decodes that ``stepped`` counts for on an instance; none where it is not up."""
        seat = self._seats.get(instance_id)
        if seat is None:
            return []
        return [name for name, entry in seat.decodes.items() if entry.joined_step is not None]

    def booked(self, instance_id: str) -> Booked:
        """Return what is the ledger's own on an instance. Raises NoInstance when it is not up."""
        seat = self._seat(instance_id)
        sheet, column = self._sheet, seat.column
        return Booked(
            len(seat.prefills) + len(seat.decodes),
            int(sheet.prefill_tokens[column]),
            int(sheet.decode_tokens[column]) - seat.foreign_resident_tokens,
            int(sheet.handoff_tokens[column]) - seat.foreign_held_tokens,
        )

    def owner_of(self, request_id: str) -> str | None:
        """Return the one instance whose loss loses the request's KV; None when it is not live."""
        entry = self._entries.get(request_id)
        return None if entry is None else entry.owner.instance.id

    def counts(self) -> Counts:
        """Return the totals over all instances and over time."""
        prefills = sum(len(seat.prefills) for seat in self._seats.values())
        decodes = sum(len(seat.decodes) for seat in self._seats.values())
        return Counts(
            instances=len(self._seats),
            dispatched=self._placed_prefills,
            prefills=prefills,
            handoffs=len(self._entries) - prefills - decodes,
            decodes=decodes,
            finished=self._finished,
            aborted=self._aborted,
            lost=self._lost,
        )

    def check_integrity(self) -> None:
        """Recompute every sum from the per-request records; raises InternalError naming what differs."""
        check_integrity(self._sheet, self._seats, self._entries)

    # Parts of events

    def _seat(self, instance_id: str) -> InstanceEntry:
        seat = self._seats.get(instance_id)
        if seat is None:
            raise NoInstance(f"instance {instance_id!r} is not up")
        return seat

    def _membership_changed(self) -> None:
        self._ids = tuple(self._seats)
        self._index = {instance_id: column for column, instance_id in enumerate(self._ids)}
        self._costs = None
        self._labels = None

    def _drop(self, entry: RequestEntry, now: float) -> None:
        if entry.prefill is not None:
            self._stages.leave_prefill(entry, now)
        if entry.source is not None:
            self._stages.release_source(entry)
        if entry.decode is not None:
            self._stages.leave_decode(entry)
        del self._entries[entry.request.id]
