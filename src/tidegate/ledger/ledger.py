"""The ledger: events in, Snapshot out. Simulator and gateway keep their books with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from heapq import heappop, heappush

import numpy as np

from tidegate.core.errors import InternalError, NoInstance
from tidegate.core.instance import Instance, Role
from tidegate.core.load_forecast import LoadForecast
from tidegate.core.request import Request
from tidegate.costs.profile import UNMEASURED, Profile, ProfileTable
from tidegate.ledger.integrity import check_integrity
from tidegate.ledger.live_table import NOWHERE
from tidegate.ledger.matrix import LedgerMatrix
from tidegate.ledger.records import Booked, InstanceEntry, RequestEntry, Residents
from tidegate.ledger.rows import DecodeRows, Forecast, Integers, RequestRows, decode_rows
from tidegate.ledger.sessions import Sessions
from tidegate.ledger.snapshot import Field, Labels, Snapshot, WindowAverages
from tidegate.ledger.windows import GRID_S, SUMS, LongWindows, close_windows


class Ledger:
    """What is where, fed by events only (Arrow v2, section 5.2: never by scraping engines); what an engine
    says of itself enters only as ``foreign_load``, beside what the ledger knows.

    Every event carries ``now`` in seconds of the driver's clock; times never decrease, but for those of
    tokens, steps and ends of transfers, which may be told late, before the next snapshot. An event costs
    O(1) and changes running sums; only instances coming and going, ``window_closed`` of a stalled
    instance and ``check_integrity`` walk over requests.

    Events about a request that is not live change nothing and return False: a driver learns late of ends.

    ``forecast``, where given, tells ``Snapshot.requests`` what is left of each answer; ``load_forecast`` is
    ``Snapshot.forecast``; ``held_prefills`` and ``start_s`` are shown as they are.
    """

    def __init__(
        self,
        window_s: float = 1.0,
        windows: Mapping[str, float] | None = None,
        forecast: Forecast | None = None,
    ) -> None:
        self._matrix = LedgerMatrix()
        self._windows = LongWindows(window_s, windows or {})
        self.sessions = Sessions()
        self._forecast = forecast
        self.load_forecast: LoadForecast | None = None
        self.start_s: Mapping[Role, float] = {}
        self._instances: dict[str, InstanceEntry] = {}
        self._entries: dict[str, RequestEntry] = {}
        self._ids: tuple[str, ...] = ()
        self._index: dict[str, int] = {}
        self._costs: ProfileTable | None = None
        self._labels: Labels | None = None
        self.held_prefills = self._placed_prefills = self._placed_decodes = 0
        self._last_flip_to_decode_s = -math.inf
        self._window_start_s = -math.inf
        self._begin_by: list[tuple[float, int, RequestEntry]] = []

    # Instances

    def instance_up(self, instance: Instance, profile: Profile, role: Role, now: float) -> None:
        """Add ``instance``, empty. Raises InternalError when its id is up already."""
        if instance.id in self._instances:
            raise InternalError(f"instance {instance.id!r} came up twice without going down")
        column = self._matrix.add_column(instance, role, measured=profile is not UNMEASURED)
        self._instances[instance.id] = InstanceEntry(instance, profile, column)
        self._matrix.queue_since_s[column] = now
        self._windows.add_column()
        self._membership_changed()

    def profile_scaled(self, instance_id: str, prefill: float, step: float) -> None:
        """Predict what is placed from now on by ``Profile.scaled`` of the instance's profile."""
        instance = self._up(instance_id)
        instance.profile = instance.profile.scaled(prefill, step)
        self._costs = None

    def instance_down(self, instance_id: str, now: float) -> list[str]:
        """Remove the instance; return every request that had work or KV there: the driver replays or ends it.

        Those whose KV is lost are not live any more. A request that was to decode here while its KV is still
        at its prefill instance waits for a decode placement again; one that decodes elsewhere, but may not
        have pulled everything from here, keeps decoding there. An unknown id returns an empty list.
        """
        instance = self._instances.get(instance_id)
        if instance is None:
            return []
        affected = [*instance.prefills.values(), *instance.decodes.values(), *instance.handoffs.values()]
        for entry in affected:
            if entry.source is instance and entry.decode is not None:
                self._matrix.release_source(entry)
                entry.last_at_s = now
            elif entry.decode is instance and entry.source is not None:
                self._matrix.leave_decode(entry)
            else:
                self._drop(entry, now)
        self.sessions.instance_down(instance_id)
        del self._instances[instance_id]
        self._matrix.remove_column(instance.column)
        self._windows.remove_column(instance.column)
        for other in self._instances.values():
            if other.column > instance.column:
                other.column -= 1
        self._membership_changed()
        return [entry.request.id for entry in affected]

    def flip(self, instance_id: str, role: Role, now: float) -> bool:
        """Relabel an instance; nothing else changes. False when unknown, not flippable or labelled so."""
        instance = self._instances.get(instance_id)
        if instance is None or not instance.spec.flippable or self._matrix.role[instance.column] == role:
            return False
        self._matrix.role[instance.column] = float(role)
        self._labels = None
        self._matrix.flipped_at_s[instance.column] = now
        if role == Role.DECODE:
            self._last_flip_to_decode_s = now
        return True

    def drains(self, instance_id: str, draining: bool) -> None:
        """Say whether an instance drains (``Snapshot.draining``); nothing where it is not up."""
        instance = self._instances.get(instance_id)
        if instance is not None:
            self._matrix.draining[instance.column] = draining

    def foreign_load(self, instance_id: str, requests: int, tokens: int) -> bool:
        """Say what is on an instance beside this ledger's requests: others' ``requests``, ``tokens`` of KV.

        Replaces what was said before. Placements see the requests as decodes with that KV, and KV without
        requests as waiting for a pull. It is in no window and no count, and goes with the instance. False
        when that is not up.
        """
        instance = self._instances.get(instance_id)
        if instance is None:
            return False
        self._matrix.set_foreign(instance, requests, tokens)
        return True

    # Requests

    def prefill_dispatched(self, request: Request, on: str, now: float) -> float:
        """Queue the request's prefill on instance ``on``; return its predicted seconds T(r, i).

        A live request of that id is aborted first: a replay supersedes it. Raises NoInstance: ``on`` is down.
        """
        instance = self._up(on)
        if not (request.id in self._entries and self.aborted(request.id, now)) and request.session:
            self.sessions.began(request, now)
        new = max(1, request.prompt_tokens - request.cached.get(on, 0))
        seconds = instance.profile.prefill_s(new, request.prompt_tokens - new)
        seconds = round(seconds / GRID_S) * GRID_S
        entry = RequestEntry(request, instance, seconds)
        self._entries[request.id] = entry
        self._placed_prefills += 1
        instance.prefills[request.id] = entry
        column = instance.column
        matrix = self._matrix
        matrix.requests.enter(entry, column)
        matrix.prefill_requests[column] += 1
        matrix.prefill_tokens[column] += request.prompt_tokens
        matrix.prefill_work_s[column] += seconds
        matrix.prefill_work_s2[column] += seconds * seconds
        matrix.change_queue(column, seconds, now)
        if instance.head is None:
            matrix.set_head(instance, entry, now)
        if not request.generated:
            begin_by_s = request.arrival_s + request.slo.ttft_s - seconds
            heappush(self._begin_by, (begin_by_s, self._placed_prefills, entry))
        return seconds

    def prefill_ended(self, request_id: str, now: float) -> bool:
        """Say that the prompt's KV is complete: it waits on its instance for a decode placement.

        Instances prefill one request after another (Arrow v2, section 4.1): the oldest one runs from the end
        of the one before it.
        """
        entry = self._entries.get(request_id)
        if entry is None or entry.prefill is None:
            return False
        instance = entry.prefill
        self._matrix.leave_prefill(entry, now)
        self._matrix.note_first_token(instance.column, entry, now)
        self._matrix.hold(entry, instance, entry.request.prompt_tokens)
        return True

    def decode_dispatched(
        self, request_id: str, on: str, resident_tokens: int, now: float, stopped_s: float | None = None
    ) -> bool:
        """Place the decode on instance ``on`` with ``resident_tokens`` of KV (prompt + generated).

        ``tokens`` counts those that come after. Where the KV is elsewhere it stays counted there, too, until
        ``transfer_ended`` or the first ``tokens``. For a request that decodes already this is a migration,
        which paused after a token at ``stopped_s`` (None: its last). Raises NoInstance when ``on`` is not up.
        """
        instance = self._up(on)
        entry = self._entries.get(request_id)
        if entry is None:
            return False
        if entry.prefill is not None:
            self.prefill_ended(request_id, now)
        if (previous := entry.decode) is not None:
            held, entry.left_at_s = entry.tokens_now, entry.token_at_s if stopped_s is None else stopped_s
            self._matrix.leave_decode(entry)
            if entry.source is None:
                self._matrix.hold(entry, previous, held)
        if entry.source is instance:
            self._matrix.release_source(entry)
        entry.last_at_s = now
        entry.generating = False
        self._matrix.enter_decode(entry, instance, resident_tokens)
        self._placed_decodes += 1
        return True

    def transfer_ended(self, request_id: str, now: float) -> bool:
        """Say that the pull ended: the KV leaves the source, and from now on the decode can stall."""
        entry = self._entries.get(request_id)
        if entry is None or entry.decode is None or entry.source is None:
            return False
        self._matrix.release_source(entry)
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
            self._matrix.leave_step(entry)
        now = now - now % GRID_S
        matrix, column = self._matrix, entry.decode.column
        matrix.decode_tokens[column] += count
        matrix.free_tokens[column] -= count
        matrix.requests.tokens[entry.slot] += count
        entry.resident_tokens += count
        if entry.generating:
            matrix.gap_sum_s[column] += now - entry.last_at_s
            matrix.gap_tokens[column] += count
        else:
            entry.generating = True
            if entry.source is not None:
                matrix.release_source(entry)
            if entry.left_at_s is not None:
                matrix.note_pause(column, now - entry.left_at_s)
                entry.left_at_s = None
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
        instance = entry.decode
        if instance.in_step and instance.stepped_at_s != entry.last_at_s:
            return False
        instance.stepped_at_s = entry.last_at_s
        self._matrix.join_step(entry)
        return True

    def stepped(self, instance_id: str, count: int, now: float) -> None:
        """Count ``count`` tokens of every decode in step on the instance, the last ones at ``now``.

        The same sums as ``tokens`` of each of them, at a cost that does not grow with their number.
        """
        instance = self._instances.get(instance_id)
        if instance is None or not instance.in_step:
            return
        now = now - now % GRID_S
        matrix, column = self._matrix, instance.column
        tokens = count * instance.in_step
        matrix.decode_tokens[column] += tokens
        matrix.free_tokens[column] -= tokens
        matrix.gap_sum_s[column] += instance.in_step * (now - instance.stepped_at_s)
        matrix.gap_tokens[column] += tokens
        instance.steps += count
        instance.stepped_at_s = now

    def left_step(self, request_id: str) -> bool:
        """Say that a decode in step pauses there (a preemption); ``tokens`` and ``joined`` bring it back."""
        entry = self._entries.get(request_id)
        if entry is None or entry.joined_step is None:
            return False
        self._matrix.leave_step(entry)
        return True

    def moves(self, request_id: str, to: str, now: float) -> bool:
        """Say that a migration of a decode to instance ``to`` begins; "" says that it is over, however."""
        entry = self._entries.get(request_id)
        if entry is None:
            return False
        entry.moving_to, table = to, self._matrix.requests
        table.moves[entry.slot], table.moved_at_s[entry.slot] = bool(to), now
        return True

    def finished(self, request_id: str, now: float) -> bool:
        """End a request that answered in full; its KV is free. False when it is not live."""
        entry = self._entries.get(request_id)
        if entry is None:
            return False
        request = entry.request
        if request.session:
            held_on = entry.prefill or entry.source or entry.decode
            assert held_on is not None, "a live request is somewhere"
            self.sessions.ended(request, held_on.spec.id, entry.tokens_now or request.prompt_tokens, now)
        self._drop(entry, now)
        return True

    def aborted(self, request_id: str, now: float) -> bool:
        """End a request that failed or was cancelled; its KV is free. False when it is not live."""
        entry = self._entries.get(request_id)
        if entry is None:
            return False
        if entry.request.session:
            self.sessions.ended(entry.request, "", 0, now)
        self._drop(entry, now)
        return True

    # Time

    def window_closed(self, now: float) -> None:
        """Close the window of inter-token gaps and queue averages, and the longer ones that end with it."""
        sums = close_windows(
            self._matrix, self._instances.values(), self._cost_table(), self._window_start_s, now
        )
        self._windows.add(sums, now - self._window_start_s)
        self._window_start_s = now

    def snapshot(self, now: float) -> Snapshot:
        """Return the cluster as of ``now``: one copy of the matrix, and each prefill once, when late."""
        while self._begin_by and self._begin_by[0][0] < now:
            self._matrix.note_hopeless(heappop(self._begin_by)[2])
        if self._labels is None:
            self._labels = Labels(self._matrix.array[Field.ROLE].copy())
        return Snapshot(
            now,
            self._ids,
            self._index,
            self._cost_table(),
            self._matrix.public.tobytes(),
            self._labels,
            self._placed_prefills,
            self._placed_decodes,
            self._last_flip_to_decode_s,
            self,
        )

    def request_rows(self, index: Mapping[str, int]) -> RequestRows:
        """Return one row per live request; ``index`` has the columns of the instances."""
        seen = None
        if index is not self._index:
            seen = np.array([index.get(name, NOWHERE) for name in self._ids] + [NOWHERE], np.int64)
        steps = np.array([instance.steps for instance in self._instances.values()], np.int64)
        return RequestRows(self._matrix.requests, steps, index, seen, self._forecast)

    def decodes_on(self, instance_id: str) -> DecodeRows:
        """Return one row per decode of an instance. Raises NoInstance when it is not up."""
        instance = self._up(instance_id)
        return decode_rows(self._matrix.requests, instance.column, instance.steps, self._forecast)

    def progress(self) -> tuple[list[Request], Integers]:
        """Return the requests that decode, and how many tokens of its answer each has."""
        rows = self.request_rows(self._index)
        decoding = np.flatnonzero(rows.decode_on != NOWHERE)
        return [rows.requests[row] for row in decoding.tolist()], rows.answer_tokens[decoding]

    def answer_tokens(self, request_id: str) -> int:
        """Return how many tokens of its answer a decode has; 0 for a request that does not decode."""
        entry = self._entries.get(request_id)
        if entry is None or entry.decode is None:
            return 0
        return entry.tokens_now - entry.request.prompt_tokens + entry.request.generated

    def window_averages(self, ids: Sequence[str]) -> dict[str, WindowAverages]:
        """Return the averages of the named windows on the instances ``ids``."""
        seen = None if ids is self._ids else [self._index[name] for name in ids]
        return self._windows.averages(self._matrix.array[SUMS], seen)

    # Questions

    @property
    def ids(self) -> tuple[str, ...]:
        """The instances that are up, in the order they came up."""
        return self._ids

    def role_of(self, instance_id: str) -> Role:
        """Return an instance's label. Raises NoInstance when it is not up."""
        return Role(int(self._matrix.role[self._up(instance_id).column]))

    def residents(self, instance_id: str) -> Residents:
        """Return who is on an instance. Raises NoInstance when it is not up."""
        instance = self._up(instance_id)
        return Residents(tuple(instance.prefills), tuple(instance.handoffs), tuple(instance.decodes))

    def booked(self, instance_id: str) -> Booked:
        """Return what is the ledger's own on an instance. Raises NoInstance when it is not up."""
        instance = self._up(instance_id)
        matrix, column = self._matrix, instance.column
        return Booked(
            len(instance.prefills) + len(instance.decodes),
            int(matrix.prefill_tokens[column]),
            int(matrix.decode_tokens[column]) - instance.foreign_resident_tokens,
            int(matrix.handoff_tokens[column]) - instance.foreign_held_tokens,
        )

    def check_integrity(self) -> None:
        """Recompute every sum from the per-request records; raises InternalError naming what differs."""
        check_integrity(self._matrix, self._instances, self._entries)

    # Parts of events

    def _up(self, instance_id: str) -> InstanceEntry:
        instance = self._instances.get(instance_id)
        if instance is None:
            raise NoInstance(f"instance {instance_id!r} is not up")
        return instance

    def _cost_table(self) -> ProfileTable:
        if self._costs is None:
            self._costs = ProfileTable.of([instance.profile for instance in self._instances.values()])
        return self._costs

    def _membership_changed(self) -> None:
        self._ids = tuple(self._instances)
        self._index = {instance_id: column for column, instance_id in enumerate(self._ids)}
        self._costs = None
        self._labels = None

    def _drop(self, entry: RequestEntry, now: float) -> None:
        if entry.prefill is not None:
            self._matrix.leave_prefill(entry, now)
        if entry.source is not None:
            self._matrix.release_source(entry)
        if entry.decode is not None:
            self._matrix.leave_decode(entry)
        self._matrix.requests.leave(entry)
        del self._entries[entry.request.id]
