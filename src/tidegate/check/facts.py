"""What servers say about themselves, and whether they say the same."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tidegate.check.server import ProbedServer
from tidegate.check.verdict import CheckVerdict, Finding, Json, common_value
from tidegate.core.errors import EngineFault, SetupError
from tidegate.core.instance import Role
from tidegate.engines.vllm.client import ServerFacts

TRIED_VERSIONS = ("0.32.0",)
"""Versions of vLLM that the adapter was run against."""
LARGEST_SKEW_S = 2.0
SAMPLE_TEXTS = (
    "The quick brown fox jumps over the lazy dog 0123456789 times.",
    "  Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich – наука, 科学, 🙂\n\tend",
    "def f(x):\n    return {'a': [x, -1.5e-3], \"b\": None}  # comment <|im_start|> </s>",
)


@dataclass(frozen=True, slots=True)
class SelfDescription:
    """What one server says of itself, and its clock minus ours; None where it does not tell."""

    facts: ServerFacts
    version: str
    clock_skew_s: float | None

    def to_json(self) -> Json:
        """Return what a report says of the server."""
        return {
            "model": self.facts.model,
            "max_model_len": self.facts.max_model_len,
            "version": self.version,
            "block_tokens": self.facts.metrics.block_tokens,
            "kv_capacity_tokens": self.facts.metrics.kv_capacity_tokens,
        }


async def describe(server: ProbedServer) -> SelfDescription:
    """Ask a server what it is. Raises EngineError when it does not answer as a vLLM server does."""
    try:
        health, facts, version = await asyncio.gather(server.ask("/health"), server.facts(), server.version())
    except SetupError as error:
        raise EngineFault(error.message, instance=server.id) from None
    if health.status != 200:
        raise EngineFault(f"/health answers {health.error}", instance=server.id)
    return SelfDescription(facts, version or "unknown", health.clock_skew_s)


def compared(probe: str, values: Mapping[str, Any], say: Callable[[Any], str], change: str) -> list[Finding]:
    """Return one finding when all values are equal, else one for each server that differs from most."""
    usual = common_value(values)
    differing = {name: value for name, value in values.items() if value != usual}
    if not differing:
        return [Finding(probe, tuple(values) if len(values) == 1 else (), CheckVerdict.GREEN, say(usual))]
    return [
        Finding(probe, (name,), CheckVerdict.RED, f"{say(value)}; the others: {say(usual)}", change)
        for name, value in differing.items()
    ]


def compare_descriptions(told: Mapping[str, SelfDescription]) -> list[Finding]:
    """Compare models, versions and block sizes."""
    found = compared(
        "model",
        {name: each.facts.models for name, each in told.items()},
        lambda names: f"serves {', '.join(names)}",
        "start it with the same model and --served-model-name as the others",
    )
    found += compared(
        "context length",
        {name: each.facts.max_model_len for name, each in told.items()},
        lambda length: f"{length:,} tokens",
        "start all with the same --max-model-len: a request has to fit wherever it goes",
    )
    versions = {name: each.version for name, each in told.items()}
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
            CheckVerdict.YELLOW,
            found[-1].observed,
            f"tidegate was run against {', '.join(TRIED_VERSIONS)}: trust what the other probes found",
        )
    return found + _block_sizes(told)


def _block_sizes(told: Mapping[str, SelfDescription]) -> list[Finding]:
    sizes = {name: each.facts.metrics.block_tokens for name, each in told.items()}
    silent = [name for name, size in sizes.items() if size is None]
    found = [
        Finding(
            "block size",
            (name,),
            CheckVerdict.RED,
            "shows no vllm:cache_config_info in /metrics",
            "start it without --disable-log-stats: tidegate needs its metrics",
        )
        for name in silent
    ]
    known = {name: size for name, size in sizes.items() if size is not None}
    if known:
        found += compared(
            "block size",
            known,
            lambda size: f"{size} tokens",
            "start all with the same --block-size",
        )
    return found


def compare_roles(told: Mapping[str, SelfDescription], kept: Mapping[str, Role]) -> list[Finding]:
    """Find members that were started for one role; those in ``kept`` are said to keep it.

    A server started as ``kv_producer`` has KV metrics, but none of its own loads. One started as
    ``kv_consumer`` shows the same metrics as ``kv_both``, and serves as such.
    """
    found = []
    for name, each in told.items():
        metrics = each.facts.metrics
        if metrics.nixl_bytes is None:
            continue
        if name in kept:
            observed = f"keeps its role: {kept[name].label}"
            found.append(Finding("role", (name,), CheckVerdict.GREEN, observed))
        elif metrics.counts_kv_fetches:
            found.append(Finding("role", (name,), CheckVerdict.GREEN, "loads KV as well as giving it"))
        else:
            found.append(
                Finding(
                    "role",
                    (name,),
                    CheckVerdict.YELLOW,
                    "fixed role: started as kv_producer (it does not count loads of its own)",
                    "plan around it as prefill=URL, or start it with kv_role kv_both to let it flip",
                )
            )
    return found


def judge_clocks(told: Mapping[str, SelfDescription]) -> list[Finding]:
    """Compare the servers' clocks with ours, by their Date headers."""
    found = []
    for name, each in told.items():
        skew_s = each.clock_skew_s
        if skew_s is None:
            found.append(Finding("clock", (name,), CheckVerdict.YELLOW, "answers without a Date header"))
        elif abs(skew_s) <= LARGEST_SKEW_S:
            found.append(Finding("clock", (name,), CheckVerdict.GREEN, "within a second or two of ours"))
        else:
            found.append(
                Finding(
                    "clock",
                    (name,),
                    CheckVerdict.YELLOW,
                    f"{abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} ours",
                    "run NTP: logs of the server and the gateway do not line up (leases are not affected)",
                )
            )
    return found
