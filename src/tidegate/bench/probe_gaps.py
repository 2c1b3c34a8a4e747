"""What the times of tokens tell about an engine's steps. Pure functions; times are seconds of one clock."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

POWERS = tuple(2**k for k in range(6, 18))
"""What token budgets are in practice."""
LAST_CHUNK = 0.3
MISCOUNT = 0.2
REMAINDER_SAFE = 1.343
"""A prompt of this times a power of two leaves a last chunk of a third of any smaller budget or more."""


def step_seconds(times: Sequence[Sequence[float]], since: Sequence[int], until: Sequence[int]) -> float:
    """Return the time of a pure decode step from tokens ``since[i]`` to ``until[i]`` of each stream.

    The mean over the streams of each step's gap takes out the jitter of delivery, the median over the
    steps whatever else the machine did in between.
    """
    steps = min(b - a for a, b in zip(since, until, strict=True))
    gaps = [np.diff(np.asarray(t[b - steps : b + 1])) for t, b in zip(times, until, strict=True)]
    return float(np.median(np.mean(gaps, axis=0)))


def gap_of_chunk(times: Sequence[Sequence[float]], first_token_s: float) -> float:
    """Return the time of the step that computed a prompt whose first token came at ``first_token_s``.

    A step's tokens leave together: in each stream, the token that came nearest to the prompt's ended the
    same step.
    """
    gaps = []
    for stream in times:
        at = np.asarray(stream)
        end = max(1, int(np.argmin(np.abs(at - first_token_s))))
        gaps.append(at[end] - at[end - 1])
    return float(np.median(gaps))


def chunks_between(stream: Sequence[float], sent_s: float, first_token_s: float, step_s: float) -> int:
    """Return how many steps beside one decode a prompt took, counting gaps between that decode's tokens.

    A step with a chunk takes well longer than ``step_s``; the last chunk is no less than LAST_CHUNK of the
    others, where the prompt has REMAINDER_SAFE's length, which tells it from a step that was held up.
    """
    at = np.asarray(stream)
    ends = at[1:]
    gaps = np.diff(at)[(ends > sent_s) & (ends < first_token_s + 0.5 * step_s)]
    long = gaps[gaps > 1.5 * step_s]
    if not len(long):
        return 1
    return int(np.sum(gaps > max(1.5 * step_s, LAST_CHUNK * float(np.median(long)))))


def token_budget(prompt_tokens: int, chunks: int) -> int | None:
    """Return the tokens of a step at most, when a prompt beside one decode took ``chunks`` steps.

    The power of two that comes nearest to as many, if any comes near, else what the steps hold at least; None
    for one chunk, which shows no bound.
    """
    if chunks < 2:
        return None
    off = {power: abs(math.ceil(prompt_tokens / (power - 1)) - chunks) for power in POWERS}
    nearest = min(off, key=lambda power: off[power])
    return nearest if off[nearest] <= MISCOUNT * chunks else math.ceil(prompt_tokens / chunks) + 1
