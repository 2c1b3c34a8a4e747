"""The stages a request's time is divided into, in order."""

from __future__ import annotations

TTFT_STAGES = ("queue", "prefill")
"""The parts of TTFT, beside the gateway's own time: the client gets the first token from the prefill."""
LATER_STAGES = ("transfer", "decode_queue", "first_step", "decode")
"""What follows the first token. The first three lie between it and the second one, and are absent where the
decode stays on the prefill's instance; ``decode`` is the rest of the answer."""
STAGES = (*TTFT_STAGES, *LATER_STAGES)
