"""The stages a request's time is divided into, in order."""

from __future__ import annotations

TTFT_STAGES = ("queue", "prefill", "transfer", "decode_queue", "first_step")
"""The parts of the time to the first token of the last leg."""
STAGES = (*TTFT_STAGES, "decode")
"""All of them; ``decode`` is the rest of the answer."""
