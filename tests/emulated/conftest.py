"""Emulated instances in this process, on real ports."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest

from tests.emulated.emulated_pair import OfTwo, Two
from tidegate.dataplane.replica import parse_groups, replicas_in
from tidegate.engines.emulated.instances import EmulatedInstances
from tidegate.engines.serving.secret import LaunchSecret

PROFILE = "h100_sxm/llama-3.1-8b"


@pytest.fixture
def two() -> OfTwo:
    @asynccontextmanager
    async def serve() -> AsyncIterator[Two]:
        groups = parse_groups([f"{PROFILE}:2"])
        instances = EmulatedInstances(groups[0].packaged.model, LaunchSecret())
        for replica in replicas_in(groups):
            await instances.add(replica, socket.create_server(("127.0.0.1", 0)))
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client:
            yield Two(client, instances)
        await instances.stop(0.0)

    return serve
