"""What the times of tokens tell about an engine's steps. Pure functions; times are seconds of one clock."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

POWERS = tuple(2**k for k in range(6, 18))
"""What token budgets are in practice."""
WINDOW = 4
BEFORE = 4
FULL_CHUNK, LAST_CHUNK = 0.6, 0.2
MISCOUNT = 0.2
REMAINDER_SAFE = 1.343
"""A prompt of this times a power of two leaves a last chunk of a third of any smaller budget or more."""


def step_seconds(times: Sequence[Sequence[float]], since: Sequence[int], until: Sequence[int]) -> float:
    """Return the time of a pure decode step from tokens ``since[i]`` to ``until[i]`` of each stream.

    The mean over the streams takes out the jitter of delivery, and so does looking at WINDOW steps at once,
    which an engine that falls behind delivers together; the median takes out whatever else the machine
    did in between.
    """
    steps = min(b - a for a, b in zip(since, until, strict=True))
    window = min(WINDOW, steps)
    ends = [np.asarray(t[b - steps : b + 1])[::window] for t, b in zip(times, until, strict=True)]
    return float(np.median(np.mean(np.diff(ends, axis=1), axis=0))) / window


def gap_of_chunk(times: Sequence[Sequence[float]], first_token_s: float) -> float:
    """Return the time of the step that computed a prompt whose first token came at ``first_token_s``.

    In each stream, the token that came nearest to the prompt's ended the same step, or the next one if the
    prompt's was held up on its way; and the token before may have come late. So two steps are taken together,
    less a pure one as long as the BEFORE ones that precede them; the median over the streams is the answer.
    """
    seconds = []
    for stream in times:
        at = np.asarray(stream)
        nearest = max(1, int(np.argmin(np.abs(at - first_token_s))))
        low = max(0, nearest - 2)
        pure = np.diff(at[max(0, low - BEFORE) : low + 1])
        step_s = float(np.mean(pure)) if len(pure) else 0.0
        seconds.append(at[nearest] - at[low] - (nearest - low - 1) * step_s)
    return float(np.median(seconds))


def chunks_between(stream: Sequence[float], sent_s: float, first_token_s: float, step_s: float) -> int:
    """Return how many steps beside one decode a prompt took, counting gaps between that decode's tokens.

    All chunks but the last take about as long as the longest. The last one ends with the prompt's first token
    and, at REMAINDER_SAFE's length, takes no less than LAST_CHUNK of that. What else is held up, as a server
    is that reads a long prompt, is neither.
    """
    at = np.asarray(stream)
    ends, gaps = at[1:], np.diff(at)
    inside = (ends > sent_s) & (ends < first_token_s + 0.5 * step_s) & (gaps > 1.5 * step_s)
    if not inside.any():
        return 1
    longest = float(np.max(gaps[inside]))
    full = inside & (gaps > FULL_CHUNK * longest)
    last = int(np.argmin(np.abs(ends - first_token_s)))
    rest = not full[last] and inside[last] and gaps[last] > LAST_CHUNK * longest
    return int(np.sum(full)) + int(rest)


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
