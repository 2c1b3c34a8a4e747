"""Predicted lengths and forecasts of the load in the control plane: what their sources hear, and who asks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from tidegate.control.live_request import LiveRequest
from tidegate.core.prediction import Prediction
from tidegate.core.request import Request
from tidegate.journal.schema import PredictedLength
from tidegate.journal.writer import JournalWriter
from tidegate.ledger.ledger import Ledger
from tidegate.signals.forecast import Earlier, LoadFeed
from tidegate.signals.lengths import LengthSource

FIRST_NOTED = 64
"""From so many tokens on a prediction is noted when the count of tokens has doubled (ours)."""


class Predictions:
    """Asks a source of lengths for placements, and tells it of progress and endings; tells ``load`` of
    arrivals, answers and time, and the ledger of its forecasts. Without both it does nothing.

    With a ``journal`` it keeps what was predicted of a request in ``LiveRequest.predicted``, for its last
    line, and writes what was expected of each period of the load.
    """

    def __init__(
        self,
        source: LengthSource | None,
        load: LoadFeed | None,
        requests: Mapping[str, LiveRequest],
        journal: JournalWriter,
    ) -> None:
        self._source = source
        self._load = load
        self._requests = requests
        self._journal = journal

    def asked(self, live: LiveRequest) -> Request:
        """Return the request as a placement sees it, with what is left of it."""
        request = live.as_request()
        if self._source is None:
            return request
        return replace(request, remaining=self._ask(self._source, request, live, live.generated))

    def start(self, ledger: Ledger, now: float, earlier: Earlier | None) -> None:
        """Begin the load's first period, behind those of an earlier run where they are known."""
        if self._load is not None:
            self._load.start(now, earlier)
            ledger.load_forecast = self._load.forecast

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
        if self._load is not None:
            self._load_passed(self._load, ledger, now)
        if self._source is None:
            return
        requests, generated = ledger.progress()
        self._source.tokens(requests, generated, now)
        if self._journal.enabled:
            for request, count in zip(requests, generated.tolist(), strict=True):
                live = self._requests[request.id]
                if count >= FIRST_NOTED and count.bit_length() > live.predicted[-1].at_token.bit_length():
                    self._ask(self._source, request, live, count)

    def _load_passed(self, load: LoadFeed, ledger: Ledger, now: float) -> None:
        """Make a forecast if a period of the load has ended, and journal what was expected of that one."""
        expected = load.forecast
        if not load.passed(now):
            return
        ledger.load_forecast = load.forecast
        if expected is not None and self._journal.enabled:
            self._journal.forecast(now, expected, load.observed._asdict())

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
        if self._journal.enabled:
            live.predicted.append(PredictedLength(count, round(found.mean, 1), found.source))
        return found
