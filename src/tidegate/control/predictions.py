"""Length predictions in the control plane: who asks the source, and what the source hears."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec.structs import replace

from tidegate.control.live_request import LiveRequest
from tidegate.core.prediction import Prediction
from tidegate.core.request import Request
from tidegate.journal.schema import PredictedLength
from tidegate.ledger.ledger import Ledger
from tidegate.signals.lengths import LengthSource

FIRST_NOTED = 64
"""From so many tokens on a prediction is noted when the count of tokens has doubled (ours)."""


class Predictions:
    """Asks a source for placements, and tells it of progress and endings. Without one it does nothing.

    With ``noting`` it keeps what was predicted of a request in ``LiveRequest.predicted``, for the journal.
    """

    def __init__(
        self, source: LengthSource | None, requests: Mapping[str, LiveRequest], *, noting: bool
    ) -> None:
        self._source = source
        self._requests = requests
        self._noting = noting

    def asked(self, live: LiveRequest) -> Request:
        """Return the request as a placement sees it, with what is left of it."""
        request = live.as_request()
        if self._source is None:
            return request
        return replace(request, remaining=self._ask(self._source, request, live, live.generated))

    def window_closed(self, ledger: Ledger, now: float) -> None:
        """Tell the source how far all decodes are."""
        if self._source is None:
            return
        requests, generated = ledger.progress()
        self._source.tokens(requests, generated, now)
        if self._noting:
            for request, count in zip(requests, generated.tolist(), strict=True):
                live = self._requests[request.id]
                if count >= FIRST_NOTED and count.bit_length() > live.predicted[-1].at_token.bit_length():
                    self._ask(self._source, request, live, count)

    def reported(self, live: LiveRequest, at_token: int, remaining: float) -> None:
        """Hand on what an engine predicts of a request that has not ended."""
        if self._source is not None and live.id in self._requests:
            self._source.reported(live.id, at_token, remaining)

    def ended(self, live: LiveRequest, *, whole: bool, now: float) -> None:
        """Tell the source of an ending; ``whole``: the request was answered in full."""
        if self._source is not None:
            hears = self._source.finished if whole else self._source.aborted
            hears(live.as_request(), live.generated, now)

    def _ask(self, source: LengthSource, request: Request, live: LiveRequest, count: int) -> Prediction:
        found = source.remaining(request, count)
        if self._noting:
            live.predicted.append(PredictedLength(count, round(found.mean, 1), found.source))
        return found
