"""What vLLM is told about KV: the rules that keep a handle true."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.core.errors import InternalError
from tidegate.engines.seam import KvHandle
from tidegate.engines.vllm.connector import MARGIN_S, Nixl, refusal

BLOCK = 32
nixl = Nixl(BLOCK, lease_s=30.0)
lengths = st.integers(1, 5 * BLOCK)


def answer(tokens: int) -> dict[str, Any]:
    """Return what vLLM answers behind a prompt of ``tokens``."""
    blocks = list(range(100, 100 + -(-tokens // BLOCK)))
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_block_ids": [blocks],
        "remote_engine_id": "e0",
        "remote_request_id": "r0",
        "remote_num_tokens": tokens,
    }


def handle(tokens: int, expires_s: float = 100.0) -> KvHandle:
    return KvHandle(answer(tokens), "e0", tokens, expires_s)


@given(lengths, lengths)
def test_a_stream_takes_exactly_the_tokens_of_its_handle(held: int, prompt: int) -> None:
    if prompt != held:
        with pytest.raises(InternalError):
            nixl.load(handle(held), prompt, pin=False)
        return
    assert nixl.load(handle(held), prompt, pin=False) == answer(held)


@given(lengths, lengths)
def test_a_leg_that_pins_extends_the_handle_or_takes_whole_blocks_of_it(held: int, prompt: int) -> None:
    sent = nixl.load(handle(held), prompt, pin=True)
    assert (sent["do_remote_prefill"], sent["do_remote_decode"]) == (False, True)
    tokens = sent.get("remote_num_tokens", 0)
    assert tokens < prompt, "something is left to compute, whose logits are sampled from"
    if prompt > held:
        assert sent == answer(held) | {"do_remote_prefill": False, "do_remote_decode": True}
    elif tokens:
        assert tokens % BLOCK == 0 and prompt - tokens <= BLOCK
        assert sent["remote_block_ids"] == [answer(held)["remote_block_ids"][0][: tokens // BLOCK]]
    else:
        assert prompt <= BLOCK and not any(name.startswith("remote_") for name in sent)


def test_a_handle_is_what_the_engine_says_about_the_whole_prompt() -> None:
    made = nixl.handle(answer(70), "r0", "e0", 70, now=5.0)
    assert made == KvHandle(answer(70), "e0", 70, 35.0)
    nothing: list[dict[str, Any] | None] = [None, {}, answer(69), answer(70) | {"remote_block_ids": []}]
    assert [nixl.handle(params, "r0", "e0", 70, now=5.0) for params in nothing] == [None] * 4


def test_an_engine_is_not_sent_its_own_handle_nor_a_late_one() -> None:
    held = handle(40, expires_s=100.0)
    assert refusal(held, "e0", 0.0) == "own"
    last_s = 100.0 - MARGIN_S
    assert [refusal(held, "e1", at_s) for at_s in (0.0, last_s - 0.001, last_s, 200.0)] == [
        None,
        None,
        "expired",
        "expired",
    ]
