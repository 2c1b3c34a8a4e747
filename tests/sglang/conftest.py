"""A fleet of stand-ins for SGLang servers."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from sglang_split import Split


@pytest.fixture
async def split() -> AsyncIterator[Split]:
    """A prefill server p and the decode servers d and e. Whatever a test does, nothing stays open."""
    split = Split()
    await split.add("p", "prefill")
    await split.add("d", "decode")
    await split.add("e", "decode")
    yield split
    await split.quiet()
    for engine in split.engines.values():
        engine.close("the test is over")
    for server in split.servers.values():
        await server.down()
    assert split.fabric.violations == []
