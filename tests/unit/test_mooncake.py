"""What MooncakeConnector is told about KV: a handle is for one prompt, and only of what stays pinned."""

from __future__ import annotations

import pytest

from tidegate.core.errors import InternalError
from tidegate.engines.vllm.connector import Mooncake

mooncake = Mooncake("eng-0", "http://10.0.0.5:8998", lease_s=30.0)


def test_the_id_that_a_leg_pins_under_is_the_one_that_the_next_pulls() -> None:
    sent = mooncake.export("r-1")
    assert sent == {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": "r-1"}
    handle = mooncake.handle(None, "r-1", "i0-1", 70, now=5.0)
    assert handle is not None and (handle.owner, handle.tokens, handle.expires_s) == ("i0-1", 70, 35.0)
    assert mooncake.load(handle, 70, pin=False) == {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "transfer_id": "r-1",
        "remote_engine_id": "eng-0",
        "remote_bootstrap_addr": "http://10.0.0.5:8998",
    }


def test_what_did_not_end_by_length_has_no_handle() -> None:
    assert mooncake.handle(None, "r-1", "i0-1", 70, now=5.0, capped=False) is None


@pytest.mark.parametrize(("prompt", "pin"), [(69, False), (71, False), (102, False), (70, True), (80, True)])
def test_a_handle_is_for_a_stream_over_exactly_its_tokens(prompt: int, pin: bool) -> None:
    handle = mooncake.handle(None, "r-1", "i0-1", 70, now=5.0)
    assert handle is not None
    with pytest.raises(InternalError):
        mooncake.load(handle, prompt, pin=pin)
