"""One SGLang server over HTTP: what it says of itself, and what it is told beside requests."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import orjson

from tidegate.core.errors import ConfigError, EngineError, EngineFault, EngineTimeout
from tidegate.core.instance import Role
from tidegate.engines.seam import Json
from tidegate.engines.sglang.facts import SglangFacts, read_facts
from tidegate.engines.wire import Wire

CONTROL_S = 10.0
"""How long a question that computes nothing may take (ours)."""
SWITCH_S = 120.0
"""How long a role switch may take: a new decode server captures its CUDA graphs first (ours)."""
ASK_AGAIN_S = 0.2
"""Pause before a server that still moves KV is asked again to switch (ours)."""


@dataclass(frozen=True, slots=True)
class SglangLoad:
    """What a server runs now, over its data-parallel ranks."""

    running: int
    waiting: int
    used_tokens: int


class SglangServer:
    """A server, its connections and the role it has. Made by ``connect_sglang``.

    ``idle`` is set while no room of this gateway is open on it. One that ``draining`` takes no new rooms.
    """

    def __init__(self, instance: str, engine_id: str, host: str, wire: Wire, facts: SglangFacts) -> None:
        self.instance = instance
        self.engine_id = engine_id
        self.host = host
        self.wire = wire
        self.facts = facts
        self.draining = False
        self.rooms = 0
        self.idle = asyncio.Event()
        self.idle.set()

    @property
    def role(self) -> Role:
        """The role it had when last asked."""
        return self.facts.role

    async def tokenise(self, text: str) -> list[int]:
        """Return the ids of a prompt. Raises EngineError."""
        body = orjson.dumps({"model": self.facts.model, "prompt": text})
        answer = await self.wire.exchange("POST", "/tokenize", body, deadline_s=CONTROL_S)
        try:
            ids: list[int] = orjson.loads(answer.body)["tokens"]
        except (orjson.JSONDecodeError, LookupError, TypeError):
            raise EngineFault(
                f"/tokenize answers HTTP {answer.status} without tokens", instance=self.instance
            ) from None
        return ids

    async def load(self) -> SglangLoad:
        """Ask what runs."""
        answer = await ask(self.wire, "/v1/loads", "/get_load")
        ranks: list[Json] = answer["loads"] if isinstance(answer, dict) else answer

        def total(name: str, old_name: str) -> int:
            counts: list[int] = [rank[name if name in rank else old_name] for rank in ranks]
            return sum(counts)

        waiting = total("num_waiting_reqs", "num_waiting_reqs")
        every = total("num_total_reqs", "num_reqs")
        return SglangLoad(every - waiting, waiting, total("num_used_tokens", "num_tokens"))

    async def abort(self, rid: str) -> None:
        """End a request, and all whose ids begin with ``rid``; failure is silent."""
        try:
            await self.wire.exchange(
                "POST", "/abort_request", orjson.dumps({"rid": rid}), deadline_s=CONTROL_S
            )
        except EngineError:
            return

    async def switch_role(self, role: Role, *, drain_s: float, decode_graphs: Json) -> None:
        """Drain the server, then make it a prefill or decode server in place.

        It takes no new rooms from now on; those that are open run to their end, for ``drain_s`` at most.
        Raises ConfigError at once when SGLang would refuse, and EngineTimeout when the server does not become
        idle: it serves on in its old role. Raises EngineFault when the switch fails: it serves on if SGLang
        says that it can, else it stays out, as it does when the answer is lost.
        """
        if role is self.role:
            return
        if self.facts.fixed_role:
            raise ConfigError(f"{self.instance} cannot become a {role.label} server: {self.facts.fixed_role}")
        if self.draining:
            raise EngineFault("the server is being switched already", instance=self.instance)
        clock = asyncio.get_running_loop().time
        give_up_s = clock() + drain_s
        body = {"new_role": role.label} | (decode_graphs if role is Role.DECODE else {})
        self.draining = True
        try:
            async with asyncio.timeout_at(give_up_s):
                await self.idle.wait()
        except TimeoutError:
            self.draining = False
            raise EngineTimeout(f"requests still run after {drain_s:g} s", instance=self.instance) from None
        except BaseException:
            self.draining = False
            raise
        while not await self._try_switch(body):
            if clock() >= give_up_s:
                self.draining = False
                raise EngineTimeout(f"SGLang says not idle after {drain_s:g} s", instance=self.instance)
            await asyncio.sleep(ASK_AGAIN_S)
        self.facts = await ask_facts(self.wire)
        self.draining = False

    async def _try_switch(self, body: Json) -> bool:
        """Ask for the switch once; False when SGLang says that it is not idle."""
        answer = await self.wire.exchange("POST", "/pd_role_switch", orjson.dumps(body), deadline_s=SWITCH_S)
        try:
            result: Json = orjson.loads(answer.body)
            message, restorable = str(result.get("message")), result.get("safe_to_restore") is True
        except (orjson.JSONDecodeError, AttributeError):
            result, message, restorable = {}, f"HTTP {answer.status}", False
        if answer.status == 200 and result.get("success"):
            return True
        if "not idle" in message:
            return False
        self.draining = not restorable
        stays = "" if restorable else "; it takes no requests until it is restarted"
        raise EngineFault(f"the role switch failed: {message}{stays}", instance=self.instance)


async def connect_sglang(
    instance: str, url: str, *, engine_id: str, connect_s: float, stall_s: float, api_key: str = ""
) -> SglangServer:
    """Ask a server what it is and return it. ``engine_id`` names its process.

    Decode servers are told the host in the URL of a prefill server: it must mean the same machine to them.
    Raises SetupError for a server that cannot be used, EngineError when it does not answer.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    wire = Wire(url, connect_s=connect_s, stall_s=stall_s, headers=headers)
    host = urlsplit(url).hostname or ""
    host = f"[{host}]" if ":" in host else host
    return SglangServer(instance, engine_id, host, wire, await ask_facts(wire))


async def ask_facts(wire: Wire) -> SglangFacts:
    """Ask a server to describe itself. Raises as ``connect_sglang`` does."""
    info = await ask(wire, "/server_info", "/get_server_info")
    model_info = await ask(wire, "/model_info", "/get_model_info")
    return read_facts(info, await ask(wire, "/v1/models"), model_info)


async def ask(wire: Wire, *paths: str) -> Any:
    """Return the JSON of the first path that the server has: newer versions renamed some."""
    for path in paths:
        answer = await wire.exchange("GET", path, deadline_s=CONTROL_S)
        if answer.status == 200:
            try:
                return orjson.loads(answer.body)
            except orjson.JSONDecodeError:
                raise EngineFault(f"GET {path} does not answer in JSON") from None
        if answer.status != 404:
            break
    raise EngineFault(f"GET {path} answers HTTP {answer.status}")
