"""What a request's change of stage adds to an instance's sums, or takes from them."""

from __future__ import annotations

from tidegate.ledger.records import InstanceEntry, RequestEntry
from tidegate.ledger.sheet import LedgerMatrix


class StageSums:
    """Keeps the sums of ``sheet`` and the records of instances in line with where requests are.

    Every method changes the matrix and the records at once; none checks whether the change is legal.
    """

    def __init__(self, sheet: LedgerMatrix) -> None:
        self.sheet = sheet

    def change_queue(self, column: int, seconds: float, now: float) -> None:
        """Add ``seconds`` of predicted prefill to a queue, or take them, and book the queue until now."""
        sheet = self.sheet
        sheet.queue_integral[column] += sheet.prefill_queue_s[column] * (now - sheet.queue_since_s[column])
        sheet.queue_since_s[column] = now
        sheet.prefill_queue_s[column] += seconds

    def set_head(self, seat: InstanceEntry, entry: RequestEntry | None, now: float, *, seen: bool) -> None:
        """Take ``entry`` for the running prefill; ``seen`` tells that a driver saw it start."""
        seat.head = entry
        seat.head_seen = seen
        self.sheet.head_s[seat.column] = entry.seconds if entry is not None else 0.0
        self.sheet.head_started_s[seat.column] = now

    def leave_prefill(self, entry: RequestEntry, now: float) -> None:
        """Take a request out of its instance's prefills."""
        seat = entry.prefill
        assert seat is not None
        entry.prefill = None
        del seat.prefills[entry.request.id]
        self.sheet.prefill_requests[seat.column] -= 1
        self.sheet.prefill_tokens[seat.column] -= entry.request.prompt_tokens
        self.change_queue(seat.column, -entry.seconds, now)
        if seat.head is entry:
            self.set_head(seat, next(iter(seat.prefills.values()), None), now, seen=False)

    def hold(self, entry: RequestEntry, seat: InstanceEntry, tokens: int) -> None:
        """Have an instance hold ``tokens`` of a request's KV until it is pulled."""
        entry.source = seat
        entry.held_tokens = tokens
        seat.handoffs[entry.request.id] = entry
        self.sheet.handoff_tokens[seat.column] += tokens
        self.sheet.free_tokens[seat.column] -= tokens

    def release_source(self, entry: RequestEntry) -> None:
        """Free the KV that waited for a pull."""
        seat = entry.source
        assert seat is not None
        entry.source = None
        del seat.handoffs[entry.request.id]
        self.sheet.handoff_tokens[seat.column] -= entry.held_tokens
        self.sheet.free_tokens[seat.column] += entry.held_tokens

    def fall_out(self, entry: RequestEntry) -> None:
        """Count a decode on its own again, no longer by its instance's steps."""
        seat = entry.decode
        assert seat is not None
        entry.resident_tokens, entry.last_at_s = entry.tokens_now, entry.token_at_s
        entry.joined_step = None
        seat.in_step -= 1

    def leave_decode(self, entry: RequestEntry) -> None:
        """Take a request out of its instance's decodes."""
        seat = entry.decode
        assert seat is not None
        if entry.joined_step is not None:
            self.fall_out(entry)
        entry.decode = None
        del seat.decodes[entry.request.id]
        self.sheet.decode_requests[seat.column] -= 1
        self.sheet.decode_tokens[seat.column] -= entry.resident_tokens
        self.sheet.free_tokens[seat.column] += entry.resident_tokens
