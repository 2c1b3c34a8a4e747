"""The stages a request's time is divided into, in order."""

from __future__ import annotations

from collections.abc import Mapping

TTFT_STAGES = ("queue", "prefill", "other")
"""The parts of TTFT, which sum to it: the client gets the first token from the prefill."""
OTHER = "HTTP to the client and the engine, KV read back"
"""What ``other`` is, in words."""
LATER_STAGES = ("transfer", "decode_queue", "first_step", "decode")
"""What follows the first token. The first three lie between it and the second one, and are absent where the
decode stays on the prefill's instance; ``decode`` is the rest of the answer."""
STAGES = (*TTFT_STAGES, *LATER_STAGES)


def parts_of_ttft(ttft_s: float, stages_s: Mapping[str, float]) -> dict[str, float]:
    """Divide a request's TTFT: ``other`` is what queue and prefill, as engines tell them, leave of it.

    Engines have clocks of their own: what would exceed the TTFT is cut off.
    """
    queue_s = min(max(0.0, stages_s.get("queue", 0.0)), ttft_s)
    prefill_s = min(max(0.0, stages_s.get("prefill", 0.0)), ttft_s - queue_s)
    return {"queue": queue_s, "prefill": prefill_s, "other": ttft_s - queue_s - prefill_s}
