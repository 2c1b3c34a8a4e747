"""The prober recovers the costs of an instance whose costs are known."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from tests.profiling.virtual_probe import VirtualLoop, VirtualTarget
from tidegate.costs.library import packaged_profile
from tidegate.engines.vllm.client import ServerFacts
from tidegate.engines.vllm.metrics import VllmMetrics
from tidegate.profiling.fit import (
    Fitted,
    Timed,
    chunks_between,
    fit_timed,
    gap_of_chunk,
    step_seconds,
    token_budget,
)
from tidegate.profiling.prober import Prober
from tidegate.profiling.target import ProbeTarget
from tidegate.profiling.unfinished import keep_unfinished, read_unfinished

FRONT_S = 0.007


def facts_of(max_model_len: int) -> ServerFacts:
    """Return the facts of a server with 400,000 tokens of KV."""
    return ServerFacts(("m",), max_model_len, VllmMetrics(block_tokens=16, kv_blocks=25_000))


def probed(name: str, budget_s: float, facts: ServerFacts, **engine: Any) -> tuple[Prober, Fitted]:
    target = VirtualTarget(packaged_profile(name).profile, front_s=FRONT_S, **engine)
    prober = Prober(cast(ProbeTarget, target), facts, None, budget_s, lambda share, what, fresh: None)
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(prober.run())
    return prober, fit_timed(name, prober.timed, source="a test")


@pytest.mark.parametrize(
    ("name", "max_batch_tokens"), [("rtx_4090/llama-3.1-8b", 2048), ("h100_sxm/llama-3.1-8b", 8192)]
)
def test_recovers_an_engines_costs(name: str, max_batch_tokens: int) -> None:
    prober, fitted = probed(name, 120.0, facts_of(32768), max_batch_tokens=max_batch_tokens, max_num_seqs=200)
    true, found = packaged_profile(name).profile, fitted.profile
    assert prober.max_batch_tokens == max_batch_tokens
    assert fitted.profile.front_s == pytest.approx(FRONT_S, rel=0.1)
    assert astuple(found.step)[:3] == pytest.approx(astuple(true.step)[:3], rel=0.02)
    assert astuple(found.mixed) == pytest.approx(astuple(true.mixed), rel=0.05)
    assert astuple(found.prefill) == pytest.approx(astuple(true.prefill), rel=0.05)
    assert {row.form for row in fitted.held_out} == {"prefill", "step", "mixed"}
    assert all(row.p95 < 0.02 for row in fitted.held_out)


def test_an_interrupted_measurement_goes_on_where_it_was(tmp_path: Path) -> None:
    name, facts, budget_s = "h100_sxm/llama-3.1-8b", facts_of(32768), 60.0
    keep, of = tmp_path / "p.json.part", ("http://one", "m")
    points: list[str] = []

    async def interrupted(after_s: float) -> None:
        target = VirtualTarget(packaged_profile(name).profile, front_s=FRONT_S, max_batch_tokens=8192)
        prober = Prober(
            cast(ProbeTarget, target), facts, None, budget_s, lambda share, what, fresh: points.append(what)
        )
        before = read_unfinished(keep, of)
        if before is not None:
            prober.go_on(before)
        with suppress(TimeoutError):
            async with asyncio.timeout(after_s):
                await prober.run()
        keep_unfinished(keep, prober.unfinished(of))

    for after_s in (15.0, 25.0, 1e3):
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            runner.run(interrupted(after_s))
    found = read_unfinished(keep, of)
    assert found is not None and read_unfinished(keep, ("http://another", "m")) is None
    assert found.spent_s == pytest.approx(budget_s, rel=0.2), "the time before counts"
    decodes = [what for what in points if what.startswith("decode")]
    assert len(decodes) - len(set(decodes)) <= 2, "only what was interrupted is timed again"
    assert sum(what.startswith("the token budget") for what in points) == 1
    whole, _ = probed(name, budget_s, facts, max_batch_tokens=8192)
    assert {(new, cached) for new, cached, _ in found.ttft} == set(whole.timed.ttft)
    timed = Timed({(n, c): s for n, c, s in found.ttft}, found.step, found.mixed)
    true = packaged_profile(name).profile
    assert astuple(fit_timed(name, timed, source="a test").profile.prefill) == pytest.approx(
        astuple(true.prefill), rel=0.05
    )


def test_finds_a_mixture_of_experts_and_less_room_than_streams() -> None:
    name = "h200_sxm/qwen3-235b-a22b/tp8"
    prober, fitted = probed(name, 60.0, facts_of(32768), max_batch_tokens=8192, max_num_seqs=100)
    true, found = packaged_profile(name).profile.step, fitted.profile.step
    assert (found.experts, found.active_experts) == (true.experts, true.active_experts)
    assert found.e_s == pytest.approx(true.e_s, rel=0.05)
    assert max(sample.batch for sample in prober.timed.step) <= 100


def test_says_so_when_nothing_is_cached() -> None:
    facts = facts_of(16384)
    prober, _ = probed("h100_sxm/llama-3.1-8b", 60.0, facts, max_batch_tokens=8192, prefix_cache=False)
    assert any("no prefix cache" in note for note in prober.notes)
    assert all(cached == 0 for _, cached in prober.timed.ttft)


def test_reads_steps_from_tokens_that_are_delivered_late() -> None:
    at = [0.01 * i for i in range(21)]
    bunched = [at[i + i % 2] for i in range(20)]  # every other token waits for the next
    assert step_seconds([bunched], [0], [16]) == pytest.approx(0.01)
    stretched = [t + (0.05 if t > 0.095 else 0.0) for t in at]  # the tenth step held a chunk
    assert gap_of_chunk([stretched], stretched[10]) == pytest.approx(0.06)
    assert gap_of_chunk([stretched], stretched[11]) == pytest.approx(0.06)
    assert chunks_between(stretched, 0.08, stretched[10], 0.01) == 1
    held_up = np.cumsum([0.0, 0.01, 0.01, 0.05, 0.16, 0.16, 0.06, 0.01]).tolist()
    assert chunks_between(held_up, 0.01, held_up[6], 0.01) == 3
    assert [token_budget(11_000, k) for k in (1, 2, 6, 23)] == [None, 8192, 2048, 512]
