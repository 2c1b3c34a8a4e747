"""Length predictions in the control plane: who asks the source, and what the source hears."""

from __future__ import annotations

from msgspec.structs import replace

from tidegate.control.live_request import LiveRequest
from tidegate.core.request import Request
from tidegate.ledger.ledger import Ledger
from tidegate.signals.lengths import LengthSource


class Predictions:
    """Asks a source for placements, and tells it of progress and endings. Without one it does nothing."""

    def __init__(self, source: LengthSource | None) -> None:
        self._source = source

    def asked(self, live: LiveRequest) -> Request:
        """Return the request as a placement sees it, with what is left of it."""
        request = live.as_request()
        if self._source is None:
            return request
        return replace(request, remaining=self._source.remaining(request, live.generated))

    def window_closed(self, ledger: Ledger, now: float) -> None:
        """Tell the source how far all decodes are."""
        if self._source is not None:
            self._source.tokens(*ledger.progress(), now)

    def reported(self, live: LiveRequest, at_token: int, remaining: float) -> None:
        """Hand on what an engine predicts."""
        if self._source is not None:
            self._source.reported(live.id, at_token, remaining)

    def ended(self, live: LiveRequest, *, whole: bool, now: float) -> None:
        """Tell the source of an ending; ``whole``: the request was answered in full."""
        if self._source is not None:
            hears = self._source.finished if whole else self._source.aborted
            hears(live.as_request(), live.generated, now)
