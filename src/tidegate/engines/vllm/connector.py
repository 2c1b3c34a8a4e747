"""What vLLM's KV connectors are told, and the rules that keep a handle true, in one place.

A connector believes what a router sends. KV that is pulled for a prompt of another length, or after its
lease, makes wrong tokens without any error, or ends the engine. So what goes out is checked here, and nowhere
else.
"""

from __future__ import annotations

from typing import Protocol

from tidegate.core.errors import InternalError
from tidegate.engines.dialect import WANT_HANDLE
from tidegate.engines.seam import Json, KvHandle

MARGIN_S = 5.0
"""How long before its lease's end a handle is not used any more: vLLM declines reads that late, and a pull
behind the end reads blocks that may be somebody else's."""


UNSERVABLE_TOKENS = 1 << 30
"""More output than any context holds: a request for it is refused before any work."""


class Connector(Protocol):
    """One of vLLM's ways to move KV between engines."""

    def export(self, request_id: str) -> Json:
        """Return what makes a leg pin its KV for others. Such a leg has to end by length."""
        ...

    def handle(
        self,
        answer: Json | None,
        request_id: str,
        owner: str,
        tokens: int,
        now: float,
        *,
        capped: bool = True,
    ) -> KvHandle | None:
        """Return the handle of such a leg, whose prompt had ``tokens``; None when it pinned nothing.

        ``answer`` is the ``kv_transfer_params`` of its answer, ``now`` the event loop's time, and ``capped``
        says that the engine ended it by length.
        """
        ...

    def load(self, handle: KvHandle, prompt_tokens: int, *, pin: bool) -> Json:
        """Return what makes a leg over ``prompt_tokens`` begin with the handle's KV.

        A leg that does not ``pin`` takes exactly the tokens of the handle. One that does extends it, or takes
        a part, where members ``extends_kv``: the handle is then cut to whole blocks. Raises InternalError for
        another length.
        """
        ...


def refusal(handle: KvHandle, engine_id: str, now: float) -> str | None:
    """Say why the engine ``engine_id`` must not be sent the handle; None when it may.

    Its own one ends the request with an error there (an assertion in vLLM); late ones load other KV.
    """
    if handle.owner == engine_id:
        return "own"
    if now >= handle.expires_s - MARGIN_S:
        return "expired"
    return None


def refused_request(kv_params: Json) -> Json:
    """Return the body of a request that vLLM refuses: it then has the owner of the KV that ``kv_params`` load
    free it. To be sent to another engine than the owner."""
    return {"prompt": [0], "max_tokens": UNSERVABLE_TOKENS, "kv_transfer_params": kv_params}


class Nixl:
    """NixlConnector in pull mode, with ``bidirectional_kv_xfer`` and ``kv_load_failure_policy: fail``.

    A stream is given its KV as ``do_remote_prefill``, which claims that the handle covers the whole prompt:
    with more, vLLM takes KV that does not exist for computed, or dies at a block's boundary; with less, it
    takes other positions. A leg that pins extends KV as ``do_remote_decode`` with ``remote_*``, which
    computes what the handle lacks.
    """

    def __init__(self, block_tokens: int, lease_s: float) -> None:
        self._block_tokens = block_tokens
        self._lease_s = lease_s

    def export(self, request_id: str) -> Json:
        """See ``Connector.export``."""
        return dict(WANT_HANDLE)

    def handle(
        self,
        answer: Json | None,
        request_id: str,
        owner: str,
        tokens: int,
        now: float,
        *,
        capped: bool = True,
    ) -> KvHandle | None:
        """See ``Connector.handle``. None also for an answer that covers something else than the prompt."""
        if not answer or not answer.get("remote_block_ids") or answer.get("remote_num_tokens") != tokens:
            return None
        return KvHandle(answer, owner, tokens, now + self._lease_s)

    def load(self, handle: KvHandle, prompt_tokens: int, *, pin: bool) -> Json:
        """See ``Connector.load``."""
        if not pin:
            if prompt_tokens != handle.tokens:
                raise InternalError(f"a handle of {handle.tokens} tokens for a prompt of {prompt_tokens}")
            return {**handle.params, "do_remote_prefill": True, "do_remote_decode": False}
        if prompt_tokens <= handle.tokens:
            handle = cut(handle, (prompt_tokens - 1) // self._block_tokens, self._block_tokens)
        if not handle.tokens:
            return self.export("")
        return {**handle.params, "do_remote_prefill": False, "do_remote_decode": True}


def cut(handle: KvHandle, blocks: int, block_tokens: int) -> KvHandle:
    """Return the handle's part for its first ``blocks``, all of them full."""
    tokens = blocks * block_tokens
    groups = [group[:blocks] for group in handle.params["remote_block_ids"]]
    params = {**handle.params, "remote_block_ids": groups, "remote_num_tokens": tokens}
    return KvHandle(params, handle.owner, tokens, handle.expires_s)
