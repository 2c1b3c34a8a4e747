"""Fleets of stand-ins for vLLM servers."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.check.fake_vllm import FakeVllm, Fault, Network, StartFleet


@pytest.fixture
async def fleet() -> AsyncIterator[StartFleet]:
    """Start servers with the given faults, i0 first."""
    started: list[FakeVllm] = []
    network = Network()

    async def start(*faults: Fault) -> list[FakeVllm]:
        for fault in faults:
            server = FakeVllm(network, fault)
            started.append(server)
            await server.start()
        return started

    yield start
    for server in started:
        await server.stop()
