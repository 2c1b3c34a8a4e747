"""How far off predicted lengths are. Run: ``python benchmarks/lengths.py TRACE... [--features]``.

Every request of a trace is predicted when it arrives and as it comes to certain counts of tokens, from what
had ended or was running by then: nothing is predicted from what came later. A token takes ``TOKEN_S``. The
first tenth of the requests is for learning and is not scored.

Printed: the mean absolute error in tokens by progress, of each source and of the mean of all answers so far;
how far the predictions are off on average (bias); and how often the truth was below the 0.1 and above the
0.9 quantile. ``--features`` compares groupings of the histogram.
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tidegate.core.request import Request
from tidegate.signals.lengths.errors import packaged_errors
from tidegate.signals.lengths.groups import Level
from tidegate.signals.lengths.histogram import HALF_LIFE_S, HistogramLengths
from tidegate.signals.lengths.known import MaxTokensLengths, OracleLengths
from tidegate.signals.lengths.simulated import SimulatedHidden
from tidegate.signals.lengths.source import Integers, LengthSource, Remaining, limits
from tidegate.workloads.choice import WorkloadChoice, load_workload, starts_sessions
from tidegate.workloads.trace import Workload

TOKEN_S = 0.025
WINDOW_S = 5.0
LIMIT = 32_768
"""What a client is taken to set as ``max_tokens``."""
AT = (0, 64, 256, 1024, 4096, 8192)
ARRIVE, CHECK, WINDOW, END = range(4)

CHAIN = (("prompt",), ("tenant",), ("tenant", "prompt"))
LEVELS: dict[str, tuple[tuple[str, ...], ...]] = {
    "none": (),
    "prompt": (("prompt",),),
    "tenant": (("tenant",),),
    "session": (("session",),),
    "prompt, tenant and both": CHAIN,
    "all four": (*CHAIN, ("session",)),
}


class MeanLength(MaxTokensLengths):
    """The mean of all answers so far, less what has come."""

    name = "mean"

    def __init__(self) -> None:
        self._sum = self._count = 0.0

    def remaining_many(self, requests: list[Request], generated: Integers) -> Remaining:  # type: ignore[override]
        mean = self._sum / self._count if self._count else LIMIT
        left = np.maximum(np.minimum(mean - generated, limits(requests, generated)), 1.0)
        return left, left, left

    def finished(self, request: Request, generated: int, now: float) -> None:
        self._sum += generated
        self._count += 1


def histogram(levels: tuple[tuple[str, ...], ...], weight: float, half_life_s: float) -> HistogramLengths:
    return HistogramLengths([Level(each, weight) for each in levels], half_life_s=half_life_s, rows=4096)


def events(workload: Workload) -> Iterator[tuple[float, int, int, int]]:
    """Yield (time, kind, row, tokens) in the order in which they happen."""
    output = workload.output_tokens
    coming: list[tuple[float, int, int, int]] = []
    window_s = WINDOW_S
    for row, arrival_s in enumerate(workload.arrival_s.tolist()):
        while True:
            first = coming[0][0] if coming else np.inf
            if min(first, window_s) > arrival_s:
                break
            if window_s <= first:
                yield window_s, WINDOW, 0, 0
                window_s += WINDOW_S
            else:
                yield heapq.heappop(coming)
        yield arrival_s, ARRIVE, row, 0
        for at in AT[1:]:
            if at < output[row]:
                heapq.heappush(coming, (arrival_s + at * TOKEN_S, CHECK, row, at))
        heapq.heappush(coming, (arrival_s + output[row] * TOKEN_S, END, row, int(output[row])))


def evaluate(workload: Workload, sources: dict[str, LengthSource]) -> dict[str, np.ndarray]:
    """Return by source the rows (at, true, mean, low, high), one for each scored prediction."""
    records = list(workload)
    requests = [
        Request(str(row), r.input_tokens, LIMIT, r.arrival_s, tenant=r.client_id, session=r.session_id)
        for row, r in enumerate(records)
    ]
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in sources}
    began: dict[int, float] = {}
    for now, kind, row, at in events(workload):
        request = requests[row]
        if kind in (ARRIVE, CHECK):
            if kind == ARRIVE:
                began[row] = now
            true = records[row].output_tokens - at
            for name, source in sources.items():
                left = source.remaining_many([request], np.array([at]))
                if row >= len(records) // 10:
                    found[name].append((at, true, *(float(each[0]) for each in left)))
        elif kind == WINDOW:
            running = [requests[each] for each in began]
            generated = np.array([(now - began_s) / TOKEN_S for began_s in began.values()], np.int64)
            for source in sources.values():
                source.tokens(running, generated, now)
        else:
            del began[row]
            for source in sources.values():
                source.finished(request, at, now)
    return {name: np.array(rows) for name, rows in found.items()}


def table(found: dict[str, np.ndarray]) -> str:
    """Return the errors by progress."""
    heads = "".join(f"{f'at {at}':>9}" for at in AT)
    lines = [f"{'':<36}{heads}{'all':>9}{'bias':>9}{'< low':>7}{'> high':>7}"]
    counts = next(iter(found.values()))[:, 0]
    numbers = "".join(f"{np.count_nonzero(counts == at):>9,}" for at in AT)
    lines.append(f"{'predictions':<36}{numbers}{len(counts):>9,}")
    for name, rows in found.items():
        at, true, mean, low, high = rows.T
        error = np.abs(mean - true)
        cells = "".join(
            f"{error[at == each].mean():>9.0f}" if (at == each).any() else f"{'-':>9}" for each in AT
        )
        lines.append(
            f"{name:<36}{cells}{error.mean():>9.0f}{(mean - true).mean():>+9.0f}"
            f"{np.mean(true < low):>7.1%}{np.mean(true > high):>7.1%}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("traces", nargs="+")
    parser.add_argument("--requests", type=int, default=None)
    parser.add_argument("--features", action="store_true")
    parser.add_argument("--weight", type=float, nargs="+", default=[4.0])
    parser.add_argument("--half-life-s", type=float, nargs="+", default=[HALF_LIFE_S])
    given = parser.parse_args()
    for trace in given.traces:
        choice = WorkloadChoice(trace=trace, limit=given.requests)
        if starts_sessions(choice):
            choice = WorkloadChoice(trace=trace, limit=given.requests, sessions_per_s=0.5)
        workload = load_workload(choice)
        output = dict(zip(map(str, range(len(workload))), workload.output_tokens.tolist(), strict=True))
        sources: dict[str, LengthSource] = {"max-tokens": MaxTokensLengths(), "mean": MeanLength()}
        if given.features:
            for name, levels in LEVELS.items():
                for weight in given.weight:
                    for half_life_s in given.half_life_s:
                        sources[f"{name}; {weight:g}, {half_life_s:g} s"] = histogram(
                            levels, weight, half_life_s
                        )
        else:
            sources |= {"histogram": HistogramLengths(), "oracle": OracleLengths(output)}
            sources["hidden, simulated"] = SimulatedHidden(output, packaged_errors())
        print(f"\n{Path(trace).name}: {len(workload):,} requests")
        print(table(evaluate(workload, sources)), flush=True)


if __name__ == "__main__":
    main()
