"""Keep what a run observes, and write it as it comes so that nothing is lost."""

from __future__ import annotations

from array import array
from types import TracebackType
from typing import Any, Self, TextIO

import orjson

from tidegate.core.slo import Slo
from tidegate.measure.results import RequestResult


class Recorder:
    """Collects results and token gaps; with a file, every result is on disk when ``add`` returns."""

    def __init__(self, slo: Slo, out: TextIO | None = None) -> None:
        self.slo = slo
        self.results: list[RequestResult] = []
        self.gaps_s = array("d")
        self.failed = 0
        self.attained = 0
        self._out = out

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._out is not None:
            self._out.close()

    def add(self, result: RequestResult, gaps_s: array[float]) -> None:
        """Record one finished request."""
        self.results.append(result)
        if result.ok:
            self.gaps_s.extend(gaps_s)
            self.attained += result.ttft_s is not None and self.slo.attained(result.ttft_s, result.tpot_s)
        elif result.status != "interrupted":
            self.failed += 1
        self.write(result.to_json())

    def write(self, line: dict[str, Any]) -> None:
        """Write a line of the file."""
        if self._out is not None:
            self._out.write(orjson.dumps(line).decode() + "\n")
            self._out.flush()
