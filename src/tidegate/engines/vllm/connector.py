"""What vLLM's KV connectors are sent, and the rules that keep a handle valid, in one place.

A connector believes what a router sends. KV that is pulled for a prompt of another length, or after its
lease, makes wrong tokens without any error, or ends the engine.
"""

from __future__ import annotations

from tidegate.core.errors import InternalError
from tidegate.engines.dialect import WANT_HANDLE
from tidegate.engines.seam import Json, KvHandle

MARGIN_S = 5.0
"""How long before its lease's end a handle is not used any more: vLLM declines reads that late, and a pull
behind the end reads blocks that may be somebody else's."""

UNSERVABLE_TOKENS = 1 << 30
"""More output than any context holds: a request for it is refused before any work."""


def refusal(handle: KvHandle, engine_id: str, now: float) -> str | None:
    """Say why the engine ``engine_id`` must not be sent the handle; None when it may. With its own handle an
    assertion fails there, and the request with it; with a late one it loads other KV."""
    if handle.owner == engine_id:
        return "own"
    if now >= handle.expires_s - MARGIN_S:
        return "expired"
    return None


def refused_request(kv_params: Json) -> Json:
    """Return the body of a request that vLLM refuses: it then has the owner of the KV that ``kv_params`` load
    free it. Send it to another engine than the owner."""
    return {"prompt": [0], "max_tokens": UNSERVABLE_TOKENS, "kv_transfer_params": kv_params}


class Nixl:
    """NixlConnector in pull mode, with ``bidirectional_kv_xfer`` and ``kv_load_failure_policy: fail``.

    A stream is given its KV as ``do_remote_prefill``, which claims that the handle covers the whole prompt:
    with another length, vLLM takes wrong KV for computed, or dies at a block's boundary. A leg that pins
    extends KV as ``do_remote_decode`` with ``remote_*``, which computes what the handle lacks.
    """

    def __init__(self, block_tokens: int, lease_s: float) -> None:
        self._block_tokens = block_tokens
        self._lease_s = lease_s

    def export(self, request_id: str) -> Json:
        """Return what makes a leg pin its KV for others. Such a leg has to end by length."""
        return dict(WANT_HANDLE)

    def handle(
        self, answer: Json | None, request_id: str, owner: str, tokens: int, now: float, capped: bool = True
    ) -> KvHandle | None:
        """Return the handle of such a leg, whose prompt had ``tokens``; None when it pinned anything else.
        ``answer`` is its ``kv_transfer_params``, ``now`` the event loop's time; the engine ended it by length
        if ``capped``."""
        if not answer or not answer.get("remote_block_ids") or answer.get("remote_num_tokens") != tokens:
            return None
        return KvHandle(answer, owner, tokens, now + self._lease_s)

    def load(self, handle: KvHandle, prompt_tokens: int, *, pin: bool) -> Json:
        """Return what makes a leg over ``prompt_tokens`` begin with the handle's KV. A leg that does not
        ``pin`` takes exactly the handle's tokens. One that does extends it, or takes a part, cut to whole
        blocks, where members ``extends_kv``. Raises InternalError for another length."""
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


class Mooncake:
    """MooncakeConnector with ``kv_load_failure_policy: fail``, with the methods of ``Nixl``. Peers find the
    server ``engine_id`` through the bootstrap server at ``bootstrap_url``.

    The transfer id is the id of the leg that pins, so that nothing has to come back in its answer. A pull
    names it, and the owner writes its last blocks into as many as the other end lacks. It compares no
    lengths: with another prompt than the handle's, blocks land at other positions, or the request fails
    (HTTP 500) where the other end lacks more than there are. So a pull takes exactly the handle's tokens, a
    handle cannot be cut, and a leg that pins begins without one.

    A leg keeps its KV only when the engine ended it by length: what an abort or a stop token ends, a
    stream that is cut for a migration among them, is free at once. Migrations export on demand, as with
    ``Nixl``.

    A handle is good for one pull. To ask for KV that is not there (pulled, late, never pinned) does not fail:
    it occupies one of the owner's twenty senders until ``lease_s`` (VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT) has
    passed, and no KV moves once all of them wait.
    """

    def __init__(self, engine_id: str, bootstrap_url: str, lease_s: float) -> None:
        self._engine_id = engine_id
        self._bootstrap_url = bootstrap_url
        self._lease_s = lease_s

    def export(self, request_id: str) -> Json:
        return WANT_HANDLE | {"transfer_id": request_id}

    def handle(
        self, answer: Json | None, request_id: str, owner: str, tokens: int, now: float, capped: bool = True
    ) -> KvHandle | None:
        if not capped:
            return None
        params = {
            "transfer_id": request_id,
            "remote_engine_id": self._engine_id,
            "remote_bootstrap_addr": self._bootstrap_url,
        }
        return KvHandle(params, owner, tokens, now + self._lease_s)

    def load(self, handle: KvHandle, prompt_tokens: int, *, pin: bool) -> Json:
        """Raises InternalError for a leg that pins, too."""
        if pin or prompt_tokens != handle.tokens:
            what = "a leg that pins" if pin else f"a prompt of {prompt_tokens}"
            raise InternalError(f"a handle of {handle.tokens} tokens for {what}")
        return {**handle.params, "do_remote_prefill": True, "do_remote_decode": False}


Connector = Nixl | Mooncake
"""One of vLLM's ways to move KV between engines."""
