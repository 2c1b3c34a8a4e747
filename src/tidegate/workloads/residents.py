"""Which requests are in mid-answer, and how far, in a fleet that has served a workload for long."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tidegate.workloads.trace import TraceRecord, Workload

_AT_ONCE = 512


@dataclass(frozen=True, slots=True, eq=False)
class MidAnswers:
    """The requests in mid-answer of a fleet that has been served ``workload`` at a steady rate for long.

    They are no sample of the workload's requests: an answer of twice the tokens runs twice as long, so that
    one finds it twice as often, at any of its tokens alike (the inspection paradox of renewal theory; Feller,
    An Introduction to Probability Theory, volume 2, section VI.7). How many they are depends on who serves
    them. Requests arrive at ``rate_rps``.
    """

    workload: Workload
    rate_rps: float
    seed: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Tokens of the answers that arrive."""
        return self.rate_rps * float(self.workload.output_tokens.mean())

    @property
    def prompt_tokens_per_s(self) -> float:
        """Tokens of the prompts that arrive."""
        return self.rate_rps * float(self.workload.input_tokens.mean())

    def drawn(self) -> Iterator[tuple[TraceRecord, int]]:
        """Yield requests without end, each with how many tokens of its answer are out: at least one, and
        never all."""
        rng = np.random.default_rng((self.seed, len(self.workload)))
        gaps = np.cumsum(np.maximum(self.workload.output_tokens - 1, 0))
        while len(gaps) and gaps[-1] > 0:
            at = rng.integers(0, gaps[-1], _AT_ONCE)
            rows = np.searchsorted(gaps, at, side="right")
            yield from zip(self.workload[rows], (gaps[rows] - at).tolist(), strict=True)
