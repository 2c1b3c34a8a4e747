"""How vLLM's MooncakeConnector is told to move KV."""

from __future__ import annotations

from tidegate.core.errors import InternalError
from tidegate.engines.dialect import WANT_HANDLE
from tidegate.engines.seam import Json, KvHandle


class Mooncake:
    """MooncakeConnector with ``kv_load_failure_policy: fail``: a ``Connector`` of the server ``engine_id``,
    which peers find through the bootstrap server at ``bootstrap_url``.

    The transfer id is the id of the leg that pins, so that nothing has to come back in its answer. A pull
    names it, and the owner writes its last blocks into as many as the other end lacks. It compares no
    lengths: with another prompt than the handle's, blocks land at other positions, or the request fails
    (HTTP 500) where the other end lacks more than there are. So a pull takes exactly the handle's tokens, a
    handle cannot be cut, and a leg that pins begins without one.

    A leg keeps its KV only when the engine ended it by length: what an abort or a stop token ends, a
    stream that is cut for a migration among them, is free at once. Migrations export on demand, as with
    ``Nixl``. Knowing the id beforehand would only help a stream that ends by length and goes on elsewhere,
    and a request does not go on behind its limit.

    A handle is good for one pull. To ask for KV that is not there (pulled, late, never pinned) does not fail:
    it occupies one of the owner's twenty senders until ``lease_s`` (VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT) has
    passed, and no KV moves once all of them wait.
    """

    def __init__(self, engine_id: str, bootstrap_url: str, lease_s: float) -> None:
        self._engine_id = engine_id
        self._bootstrap_url = bootstrap_url
        self._lease_s = lease_s

    def export(self, request_id: str) -> Json:
        """See ``Connector.export``."""
        return WANT_HANDLE | {"transfer_id": request_id}

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
        """See ``Connector.handle``."""
        if not capped:
            return None
        params = {
            "transfer_id": request_id,
            "remote_engine_id": self._engine_id,
            "remote_bootstrap_addr": self._bootstrap_url,
        }
        return KvHandle(params, owner, tokens, now + self._lease_s)

    def load(self, handle: KvHandle, prompt_tokens: int, *, pin: bool) -> Json:
        """See ``Connector.load``. Raises InternalError for a leg that pins, too."""
        if pin or prompt_tokens != handle.tokens:
            what = "a leg that pins" if pin else f"a prompt of {prompt_tokens}"
            raise InternalError(f"a handle of {handle.tokens} tokens for {what}")
        return {**handle.params, "do_remote_prefill": True, "do_remote_decode": False}
