"""An embedded engine with a slack budget: chunks as long as its decodes allow, and the same answers."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from tests.engine_server.engine_fakes import until
from tests.engine_server.test_engine_order import Said, serving
from tidegate.costs.forms import MixedCost, StepCost
from tidegate.costs.profile import UNMEASURED
from tidegate.engines.embedded.engine import EmbeddedEngine
from tidegate.engines.embedded.model import Batch
from tidegate.engines.embedded.options import EngineConfig
from tidegate.engines.embedded.tiny_model import make_tiny_model
from tidegate.engines.seam import Leg
from tidegate.policies.order import Ticket
from tidegate.protocol.chunks import Tokens
from tidegate_testing import VirtualClock

SECOND_PER_TOKEN = replace(UNMEASURED, step=StepCost(0.0, 1.0, 0.0), mixed=MixedCost(0.0, 1.0, 0.0, 0.0))
PROMPT = list(range(5, 65))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


class Answer(Said):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__("", [])
        self.token_ids: list[int] = []

    def tokens(self, tokens: Tokens) -> None:
        self.token_ids += tokens.token_ids

    def plain(self, text: str, token_ids: list[int]) -> None:
        self.token_ids += token_ids


def begun(first_token_s: float, due_s: float = 30.0) -> Ticket:
    return Ticket(-60.0, due_s, 0.0, tpot_s=10.0, first_token_s=first_token_s)


@pytest.mark.parametrize(
    ("chunks", "ticket", "sizes"),
    [
        ("fixed", begun(0.0), [60]),
        # Its third token is due at 20 s, the next one at 30 s, by a clock that stands still; of that 2 % are
        # left for the cost's error.
        ("slack", begun(0.0), [18, 28, 14]),
        # Its client had the first token five seconds ago.
        ("slack", begun(-5.0), [13, 23, 24]),
        # Its first token was late, so that no target is left to attain.
        ("slack", begun(-5.0, -6.0), [60]),
    ],
)
async def test_a_chunk_is_as_long_as_the_decode_beside_it_has_time(
    model: Path, monkeypatch: pytest.MonkeyPatch, chunks: str, ticket: Ticket, sizes: list[int]
) -> None:
    """The tickets come over HTTP, in a leg that goes on with an answer elsewhere begun."""
    config = EngineConfig(model, dtype="float64", total_blocks=64, chunks=chunks)
    engine = EmbeddedEngine(config, VirtualClock(100.0))
    engine.scheduler.price(SECOND_PER_TOKEN)
    found: list[int] = []
    schedule = engine.scheduler.schedule

    def noted() -> Batch:
        batch = schedule()
        if batch.singles:
            found.extend(chunk.count for chunk in batch.chunks)
        return batch

    monkeypatch.setattr(engine.scheduler, "schedule", noted)
    answer, decode = Answer(), Answer()
    async with serving(engine) as (client, step):
        goes_on = Leg("decode", [5, 6, 7, 8], None, 20, {"temperature": 0}, generated=1, ticket=ticket)
        decodes = asyncio.create_task(client.run(goes_on, decode, deadline_s=60.0))
        await until(lambda: engine.stats().waiting == 1)
        step()
        asked = Leg("prompt", PROMPT, None, 3, {"temperature": 0}, ticket=Ticket(0.0, 9.0, 0.0, tpot_s=10.0))
        prompt = asyncio.create_task(client.run(asked, answer, deadline_s=60.0))
        await until(lambda: engine.stats().waiting == 1)
        for _ in range(20):
            step()
        await asyncio.gather(decodes, prompt)
    assert found == sizes
    alone = EmbeddedEngine(EngineConfig(model, dtype="float64", total_blocks=64))
    expected = Answer()
    async with serving(alone) as (client, step):
        again = asyncio.create_task(client.run(asked, expected, deadline_s=60.0))
        await until(lambda: alone.stats().waiting == 1)
        for _ in range(3):
            step()
        await again
    assert answer.token_ids == expected.token_ids and len(expected.token_ids) == 3
