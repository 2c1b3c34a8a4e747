"""What servers say about themselves, and whether they say the same."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tidegate.check.counters import Counters
from tidegate.check.server import Server
from tidegate.check.verdict import Finding, Json, Verdict, common_value
from tidegate.core.errors import EngineFault
from tidegate.core.instance import Role

TRIED_VERSIONS = ("0.32.0",)
"""Versions of vLLM that the adapter was run against."""
LARGEST_SKEW_S = 2.0
SAMPLE_TEXTS = (
    "The quick brown fox jumps over the lazy dog 0123456789 times.",
    "  Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich – наука, 科学, 🙂\n\tend",
    "def f(x):\n    return {'a': [x, -1.5e-3], \"b\": None}  # comment <|im_start|> </s>",
)


@dataclass(frozen=True, slots=True)
class Facts:
    """One server's own words. ``counters`` is None when it shows no metrics."""

    models: tuple[str, ...]
    max_model_len: int
    version: str
    counters: Counters | None
    skew_s: float | None

    @property
    def model(self) -> str:
        """The name that requests use: the first one listed."""
        return self.models[0]

    @property
    def block_tokens(self) -> int | None:
        """Tokens of one KV block."""
        return self.counters.block_tokens if self.counters else None

    def to_json(self) -> Json:
        """Return what a report says of the server."""
        blocks = self.counters.kv_blocks if self.counters else None
        return {
            "model": self.model,
            "max_model_len": self.max_model_len,
            "version": self.version,
            "block_tokens": self.block_tokens,
            "kv_capacity_tokens": blocks * self.block_tokens if blocks and self.block_tokens else None,
        }


async def look(server: Server) -> Facts:
    """Ask a server what it is. Raises EngineError when it does not answer as a vLLM server does."""
    health, models, version = await asyncio.gather(
        server.ask("/health"), server.ask("/v1/models"), server.ask("/version")
    )
    if health.status != 200:
        raise EngineFault(f"/health answers {health.error}", instance=server.id)
    if models.status in (401, 403):
        raise EngineFault("it wants an API key: give --api-key", instance=server.id)
    try:
        listed: list[dict[str, Any]] = models.body["data"]
        names = tuple(str(model["id"]) for model in listed)
        length = int(listed[0]["max_model_len"])
    except (LookupError, TypeError, ValueError):
        raise EngineFault("/v1/models is not what vLLM's own server answers", instance=server.id) from None
    try:
        counters = await server.counters()
    except EngineFault:
        counters = None
    return Facts(names, length, str(version.body.get("version", "unknown")), counters, health.skew_s)


async def tokens_of(server: Server, text: str) -> list[int]:
    """Return the ids of ``text`` by the server's tokenizer. Raises EngineFault when it does not tell."""
    reply = await server.ask(
        "/tokenize", {"model": server.model, "prompt": text, "add_special_tokens": False}
    )
    ids = reply.body.get("tokens")
    if reply.status != 200 or not isinstance(ids, list):
        raise EngineFault(f"/tokenize answers {reply.error}", instance=server.id)
    return ids


def compared(probe: str, values: Mapping[str, Any], say: Callable[[Any], str], change: str) -> list[Finding]:
    """Return one finding when all values are equal, else one for each server that differs from most."""
    usual = common_value(values)
    differing = {name: value for name, value in values.items() if value != usual}
    if not differing:
        return [Finding(probe, tuple(values) if len(values) == 1 else (), Verdict.GREEN, say(usual))]
    return [
        Finding(probe, (name,), Verdict.RED, f"{say(value)}; the others: {say(usual)}", change)
        for name, value in differing.items()
    ]


def compare_facts(facts: Mapping[str, Facts]) -> list[Finding]:
    """Compare models, versions and block sizes."""
    found = compared(
        "model",
        {name: each.models for name, each in facts.items()},
        lambda names: f"serves {', '.join(names)}",
        "start it with the same model and --served-model-name as the others",
    )
    found += compared(
        "context length",
        {name: each.max_model_len for name, each in facts.items()},
        lambda length: f"{length:,} tokens",
        "start all with the same --max-model-len: a request has to fit wherever it goes",
    )
    versions = {name: each.version for name, each in facts.items()}
    found += compared(
        "version",
        versions,
        lambda version: f"vLLM {version}",
        "run the same vLLM everywhere: servers of different versions refuse each other's KV",
    )
    if len(set(versions.values())) == 1 and not set(versions.values()) <= set(TRIED_VERSIONS):
        found[-1] = Finding(
            "version",
            (),
            Verdict.YELLOW,
            found[-1].observed,
            f"tidegate was run against {', '.join(TRIED_VERSIONS)}: trust what the other probes found",
        )
    return found + _block_sizes(facts)


def _block_sizes(facts: Mapping[str, Facts]) -> list[Finding]:
    sizes = {name: each.block_tokens for name, each in facts.items()}
    silent = [name for name, size in sizes.items() if size is None]
    found = [
        Finding(
            "block size",
            (name,),
            Verdict.RED,
            "shows no vllm:cache_config_info in /metrics",
            "start it without --disable-log-stats: tidegate needs its metrics",
        )
        for name in silent
    ]
    told = {name: size for name, size in sizes.items() if size is not None}
    if told:
        found += compared(
            "block size",
            told,
            lambda size: f"{size} tokens",
            "start all with the same --block-size",
        )
    return found


def compare_roles(facts: Mapping[str, Facts], kept: Mapping[str, Role]) -> list[Finding]:
    """Find members that were started for one role; those in ``kept`` are said to keep it.

    A server started as ``kv_producer`` has KV counters, but none of its own loads. One started as
    ``kv_consumer`` shows the same metrics as ``kv_both``, and serves as such.
    """
    found = []
    for name, each in facts.items():
        if each.counters is None or each.counters.nixl_bytes is None:
            continue
        if name in kept:
            observed = f"keeps its role: {kept[name].label}"
            found.append(Finding("role", (name,), Verdict.GREEN, observed))
        elif each.counters.shows_kv_fetch:
            found.append(Finding("role", (name,), Verdict.GREEN, "loads KV as well as giving it"))
        else:
            found.append(
                Finding(
                    "role",
                    (name,),
                    Verdict.YELLOW,
                    "fixed role: started as kv_producer (it does not count loads of its own)",
                    "plan around it as prefill=URL, or start it with kv_role kv_both to let it flip",
                )
            )
    return found


def judge_clocks(facts: Mapping[str, Facts]) -> list[Finding]:
    """Compare the servers' clocks with ours, by their Date headers."""
    found = []
    for name, each in facts.items():
        if each.skew_s is None:
            found.append(Finding("clock", (name,), Verdict.YELLOW, "answers without a Date header"))
        elif abs(each.skew_s) <= LARGEST_SKEW_S:
            found.append(Finding("clock", (name,), Verdict.GREEN, "within a second or two of ours"))
        else:
            found.append(
                Finding(
                    "clock",
                    (name,),
                    Verdict.YELLOW,
                    f"{abs(each.skew_s):.0f} s {'ahead of' if each.skew_s > 0 else 'behind'} ours",
                    "run NTP: logs of the server and the gateway do not line up (leases are not affected)",
                )
            )
    return found
