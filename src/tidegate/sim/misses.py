"""Which requests are known to miss their SLO while a simulation runs, for who may end it early."""

from __future__ import annotations

from collections.abc import Callable

from tidegate.sim.simulated_request import SimulatedRequest


class Misses:
    """Tells ``missed`` once of each request that will not attain, by its place in the order of arrival: at
    its first token where that is late, else when it ends. An exception of ``missed`` ends the simulation."""

    def __init__(self, missed: Callable[[int], None]) -> None:
        self._missed = missed

    def first_token(self, live: SimulatedRequest) -> None:
        """Say that a request has its first token."""
        if self._late(live):
            self._missed(live.index)

    def ended(self, live: SimulatedRequest, whole: bool) -> None:
        """Say that a request is over; ``whole``: answered in full."""
        slo, gaps = live.request.slo, live.generated - 1
        if self._late(live):
            return
        ttft_s = live.first_token_s - live.request.arrival_s
        tpot_s = (live.last_token_s - live.first_token_s) / gaps if gaps > 0 else None
        if not whole or not slo.attained(ttft_s, tpot_s):
            self._missed(live.index)

    @staticmethod
    def _late(live: SimulatedRequest) -> bool:
        return live.first_token_s - live.request.arrival_s > live.request.slo.ttft_s
