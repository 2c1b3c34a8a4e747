"""The blocks of a call's prompt, by which the prefix index knows it again."""

from __future__ import annotations

from collections.abc import Iterator

from tidegate.gateway.call import Call
from tidegate.gateway.token_estimate import TokenEstimate
from tidegate.signals.prefix import PromptBlocks

BLOCK_TOKENS = 64
"""Tokens of a block where the prompt comes as ids (ours): four of vLLM's, so that long prompts stay cheap."""
BLOCK_CHARS = 256
"""Characters of a block where it comes as text (ours): about as long."""

MOST_BLOCKS = 4096
"""Blocks of a prompt that are looked at (ours): hashing a huge body whole would hold up every stream."""


def prompt_blocks(call: Call, estimate: TokenEstimate) -> PromptBlocks:
    """Return the prompt's whole blocks. Prompts of different tenants or salts share none."""
    key = hash((call.tenant, call.salt, call.model, call.chat))
    if isinstance(call.prompt, list):
        return PromptBlocks(tuple(_chain(key, call.prompt, BLOCK_TOKENS)), BLOCK_TOKENS)
    text = call.prompt or "" if call.messages is None else repr(call.messages)
    tokens = float(estimate.tokens(BLOCK_CHARS))
    return PromptBlocks(tuple(_chain(key, text, BLOCK_CHARS)), tokens)


def _chain(key: int, prompt: list[int] | str, length: int) -> Iterator[int]:
    for start in range(0, min(len(prompt) - length + 1, MOST_BLOCKS * length), length):
        block = prompt[start : start + length]
        key = hash((key, block if isinstance(block, str) else tuple(block)))
        yield key
