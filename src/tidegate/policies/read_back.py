"""Whether a later round's prefill reads the KV of the earlier ones back from where they were decoded."""

from __future__ import annotations

from tidegate.costs.forms import attention_work
from tidegate.costs.profile import Profile

LEAST_TOKENS = 64
"""What a read has to save where nothing is known of costs. vLLM's own threshold."""


def worth_reading_back(
    prompt_tokens: int,
    held_tokens: int,
    here_tokens: int,
    block_tokens: int,
    profile: Profile | None,
    kv_bytes_per_token: int,
) -> bool:
    """Tell whether pulling the first ``held_tokens`` of a prompt beats computing them.

    ``here_tokens`` of them the prefill instance has itself. Reading costs the holder a step over the block
    that its prefix cache lacks, and the link the rest; in return the prefill is so much shorter (AMPD,
    section 4: local or remote incremental prefill, here for the remote one only).
    """
    saved = held_tokens - here_tokens
    if saved < block_tokens:
        return False
    if profile is None:
        return saved >= LEAST_TOKENS
    prefill = profile.prefill

    def compute_s(cached: int) -> float:
        new = prompt_tokens - cached
        return float(prefill.seconds(new, attention_work(new, cached)))

    export_s = float(prefill.seconds(block_tokens, attention_work(block_tokens, held_tokens)))
    moved_s = float(profile.transfer.seconds(saved * kv_bytes_per_token))
    return export_s + moved_s + compute_s(held_tokens) < compute_s(here_tokens)
