"""An order that the control plane keeps: vLLM gets few prompts at a time, the next one by the order."""

from __future__ import annotations

import asyncio
import random
from functools import partial
from pathlib import Path

import pytest

from tests.vllm.through_gateway import COMPLETIONS, Said, ask, client, record_legs, serving
from tests.vllm.vllm_servers import SERVED_NAME, VllmCluster
from tidegate.control.plane import ControlPlane
from tidegate.core.slo import Slo
from tidegate.engines.seam import Leg, LegEnd, TokensSink
from tidegate.engines.vllm.engine import VllmEngine
from tidegate.policies.order import Ticket
from tidegate.policies.orders import make_order
from tidegate_testing import profile

LENGTHS = (400, 390, 380, 130, 300, 170, 250, 120, 220, 340, 190, 150)
SECONDS = 1e-3
"""What a token of a prompt is predicted to take: so much that two prompts are enough for a server."""


def arrived(plane: ControlPlane, count: int) -> bool:
    return len(plane.requests) == count


@pytest.mark.parametrize("servers_of_arch", ["llama"], indirect=True)
async def test_prompts_are_held_and_sent_by_length(
    cluster: VllmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everyone_waits = asyncio.Event()
    run = VllmEngine.run

    async def gated(engine: VllmEngine, leg: Leg, sink: TokensSink, *, deadline_s: float) -> LegEnd:
        await everyone_waits.wait()
        return await run(engine, leg, sink, deadline_s=deadline_s)

    monkeypatch.setattr(VllmEngine, "run", gated)
    runs = record_legs(monkeypatch)
    chance = random.Random(31)
    prompts = [[chance.randrange(5, 512) for _ in range(length)] for length in LENGTHS]
    costs = profile(prefill=(0.0, SECONDS, 0.0), step=(4e-3, 0.0, 1e-7), transfer=(5e-3, 1e9))
    async with (
        client() as session,
        serving(cluster.urls[:2], tmp_path, system="static+held-length-aware", profiles=(costs,)) as running,
    ):
        plane = running.gateway.dispatcher.plane
        asked: list[asyncio.Task[Said]] = []
        for count, prompt in enumerate(prompts):
            body = {"model": SERVED_NAME, "prompt": prompt, "max_tokens": 3, "temperature": 0}
            body |= {"ignore_eos": True, "return_token_ids": True}
            asked.append(asyncio.create_task(ask(session, running.url, COMPLETIONS, body)))
            await running.until(partial(arrived, plane, count + 1))
        assert plane.held_count == len(LENGTHS) - 2
        everyone_waits.set()
        answers = await asyncio.gather(*asked)
    queue = make_order("length-aware").queue()
    for length in LENGTHS[2:]:
        queue.push(length, Ticket(0.0, Slo().ttft_s, length * SECONDS, length))
    by_length = [queue.pop(0.0) for _ in LENGTHS[2:]]
    prefilled = [each.leg.prompt for each in runs if each.leg.pin]
    assert [len(ids) for ids in prefilled if isinstance(ids, list)] == [*LENGTHS[:2], *by_length]
    assert by_length != list(LENGTHS[2:]), "not the order of arrival"
    assert [said.status for said in answers] == [200] * len(LENGTHS)
    for prompt, said in zip(prompts, answers, strict=True):
        assert said.ids == cluster[0].reference(prompt, 3)
