"""Predicted lengths and forecasts of the load in the control plane: what their sources hear, and who asks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from tidegate.control.live_request import LiveRequest
from tidegate.core.prediction import Prediction
from tidegate.core.request import Request
from tidegate.journal.schema import PredictedLength
from tidegate.ledger.ledger import Ledger
from tidegate.signals.forecast import LoadFeed
from tidegate.signals.lengths import LengthSource

FIRST_NOTED = 64
"""From so many tokens on a prediction is noted when the count of tokens has doubled (ours)."""


class Predictions:
    """Asks a source of lengths for placements, and tells it of progress and endings; tells ``load`` of
    arrivals, answers and time, and the ledger of its forecasts. Without both it does nothing.

    With ``noting`` it keeps what was predicted of a request in ``LiveRequest.predicted``, for the journal.
    """

    def __init__(
        self,
        source: LengthSource | None,
        load: LoadFeed | None,
        requests: Mapping[str, LiveRequest],
        *,
        noting: bool,
    ) -> None:
        self._source = source
        self._load = load
        self._requests = requests
        self._noting = noting

    def asked(self, live: LiveRequest) -> Request:
        """Return the request as a placement sees it, with what is left of it."""
        request = live.as_request()
        if self._source is None:
            return request
        return replace(request, remaining=self._ask(self._source, request, live, live.generated))

    def start(self, now: float) -> None:
        """Begin the load's first period."""
        if self._load is not None:
            self._load.start(now)

    def arrived(self, live: LiveRequest) -> None:
        """Count a new request."""
        if self._load is not None:
            self._load.arrived(live.as_request().prompt_tokens)

    def load_fitted(self, ledger: Ledger, number: int, expected: Mapping[str, Any]) -> None:
        """Hand on what a slower source expects of the load."""
        if self._load is not None and self._load.revised(number, expected):
            ledger.load_forecast = self._load.forecast

    def window_closed(self, ledger: Ledger, now: float) -> None:
        """Tell the source how far all decodes are, and the load that time has passed."""
        if self._load is not None and self._load.passed(now):
            ledger.load_forecast = self._load.forecast
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
        """Tell the sources of an ending; ``whole``: the request was answered in full."""
        if self._load is not None and whole:
            self._load.answered(live.as_request().prompt_tokens - live.generated, live.generated)
        if self._source is not None:
            hears = self._source.finished if whole else self._source.aborted
            hears(live.as_request(), live.generated, now)

    def _ask(self, source: LengthSource, request: Request, live: LiveRequest, count: int) -> Prediction:
        found = source.remaining(request, count)
        if self._noting:
            live.predicted.append(PredictedLength(count, round(found.mean, 1), found.source))
        return found
