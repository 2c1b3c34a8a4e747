"""What the probes of one check share: servers, prompts, reference answers, handles, findings."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from tidegate.check.server import PinnedHandles, ProbedServer, SelfDescription
from tidegate.check.verdict import RED, Finding, shared_start
from tidegate.core.errors import EngineError
from tidegate.core.instance import Role
from tidegate.core.slo import Slo
from tidegate.engines.vllm.client import BLOCK_TOKENS
from tidegate.engines.vllm.connector import Nixl
from tidegate.fleet.member import LEASE_S

REFERENCE_TOKENS = 24
SHORTEST_PULL = 96
"""Tokens: above vLLM's default ``kv_recompute_threshold`` of 64, under which KV is not read back."""


@dataclass(frozen=True, slots=True)
class CheckSettings:
    """What to check: each server's URL, and its role if it keeps one. With ``slo`` the servers' speed is
    judged; ``thorough`` waits for leases to end, which have to last ``lease_s``.
    ``ours``: tidegate's own instances, whose KV moves in another protocol, which is not probed."""

    servers: tuple[tuple[str, Role | None], ...]
    api_key: str = field(default="", repr=False)
    ours: bool = False
    slo: Slo | None = None
    thorough: bool = False
    lease_s: float = LEASE_S


@dataclass(slots=True)
class CheckContext:
    """The state of one check. ``servers`` has all by id, in the order given."""

    settings: CheckSettings
    servers: dict[str, ProbedServer]
    pins: PinnedHandles
    roles: dict[str, Role]
    """The roles of servers that keep one."""
    described: dict[str, SelfDescription] = field(default_factory=dict)
    """What servers say of themselves; a server that does not answer is missing."""
    findings: list[Finding] = field(default_factory=list)
    excluded: dict[str, str] = field(default_factory=dict)
    """Why a server is not probed any further, by id; the first reason stays."""
    vocabulary: list[int] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)
    answers: dict[str, list[int]] = field(default_factory=dict)
    """What follows ``prompt``, greedily, on each server when it computes all of it itself."""
    run: str = field(default_factory=lambda: secrets.token_hex(4))
    _random: random.Random = field(default_factory=random.SystemRandom)

    @property
    def active(self) -> list[ProbedServer]:
        """The servers that are not excluded."""
        return [server for name, server in self.servers.items() if name not in self.excluded]

    @property
    def block_tokens(self) -> int:
        """The block size that all active servers have."""
        return next((self.described[each.id].facts.block_tokens for each in self.active), BLOCK_TOKENS)

    @property
    def nixl(self) -> Nixl:
        """The connector's parameters for the servers' KV."""
        return Nixl(self.block_tokens, self.settings.lease_s)

    def add(self, *findings: Finding | None) -> None:
        """Enter findings; None is none."""
        self.findings += [each for each in findings if each is not None]

    def produces_kv(self, name: str) -> bool:
        """Tell whether others are to pull KV from the server."""
        return self.roles.get(name) is not Role.DECODE

    def consumes_kv(self, name: str) -> bool:
        """Tell whether the server is to pull KV of others."""
        return self.roles.get(name) is not Role.PREFILL

    def fresh_prompt(self, tokens: int) -> list[int]:
        """Return a prompt that no server has seen."""
        return self._random.choices(self.vocabulary, k=tokens)

    def salt(self, *parts: str) -> str:
        """Return a cache salt of this check: KV of a prompt is found only under the same one."""
        return "-".join(("tidegate-check", self.run, *parts))

    def expected(self, *names: str) -> list[int]:
        """Return how far the servers' own answers to the prompt agree."""
        return shared_start([self.answers[name] for name in names])

    def choose_prompt(self) -> None:
        """Choose the prompt of all KV probes: some whole blocks and a half."""
        block = self.block_tokens
        blocks = max(2, -(-SHORTEST_PULL // block))
        room = min(self.described[each.id].facts.max_model_len for each in self.active) - 4 * REFERENCE_TOKENS
        self.prompt = self.fresh_prompt(max(8, min(blocks * block + block // 2, room)))

    async def run_on_each(
        self, probe: str, run: Callable[[ProbedServer], Awaitable[Finding | None]], *, fatal: str = ""
    ) -> None:
        """Run ``run`` for all active servers at once; an engine's error is a finding. A server whose finding
        is RED is excluded when ``fatal`` says why."""
        runs = (self.run_probe(probe, each.id, run(each)) for each in self.active)
        for found in await asyncio.gather(*runs):
            self.add(found)
            if fatal and found is not None and found.verdict is RED:
                self.excluded.setdefault(found.where[0], fatal)

    async def run_probe(self, probe: str, name: str, run: Awaitable[Finding | None]) -> Finding | None:
        """Await a probe's finding; an engine's error becomes one."""
        try:
            return await run
        except EngineError as error:
            who = f"{error.instance}: " if error.instance not in ("", name) else ""
            return Finding(probe, (name,), RED, f"{who}{error.message}", "see the server's log")
