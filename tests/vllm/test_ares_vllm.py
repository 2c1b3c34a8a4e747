"""Decodes that a rescheduling policy moves between real servers say what one server alone says."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from tests.vllm.mixed_requests import Asked, mixed_requests
from tests.vllm.through_gateway import Said, ask, client, serving
from tests.vllm.vllm_servers import VllmCluster
from tidegate.core.slo import Slo
from tidegate.policies.ares.published import AresConstants, AresRescheduler
from tidegate.systems import make_system
from tidegate.systems.system import System

REQUESTS = 100
IN_FLIGHT = 12


def eager_ares() -> System:
    """ARES with rounds five times as often, in which any move counts that lowers the variance at all."""
    system = make_system("ares", slo=Slo())
    (rescheduler,) = system.controllers
    assert isinstance(rescheduler, AresRescheduler)
    eager = AresConstants(theta=0.0, epsilon=0.0, kappa=0.0, cooldown_s=0.5)
    return replace(system, controllers=(replace(rescheduler, constants=eager, period_s=0.2),))


@pytest.mark.parametrize("servers_of_arch", ["llama"], indirect=True)
async def test_rescheduled_decodes_change_no_answer(cluster: VllmCluster, tmp_path: Path) -> None:
    free = asyncio.Semaphore(IN_FLIGHT)
    async with client() as session:
        wanted = await mixed_requests(session, cluster[0], REQUESTS, seed=23)
        async with serving(cluster.urls, tmp_path, system=eager_ares()) as running:

            async def through(asked: Asked) -> Said:
                async with free:
                    return await ask(session, running.url, asked.path, asked.body)

            answers = await asyncio.gather(*(through(asked) for asked in wanted))
            moved = running.metric("tidegate_migrations_total", event="done")
            predicted = [row.get("predicted_lengths") for row in running.outcomes().values()]

    pairs = list(zip(wanted, answers, strict=True))
    differing = [(asked, said.told()) for asked, said in pairs if said.told() != asked.expected.told()]
    assert not differing, (len(differing), *differing[:3])
    assert moved > REQUESTS / 20
    assert any(predicted), "the policy goes by predicted lengths"
