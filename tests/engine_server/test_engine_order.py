"""An engine started with an order serves by the tickets that the gateway's client sends, over real HTTP."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.engine_server.engine_fakes import FACTS, until
from tidegate.engines.dialect import DialectEngine
from tidegate.engines.embedded.engine import EmbeddedEngine
from tidegate.engines.embedded.options import EngineConfig
from tidegate.engines.embedded.tiny_model import make_tiny_model
from tidegate.engines.seam import Leg, LegEnd
from tidegate.engines.serving.delivery import OutputRouter
from tidegate.engines.serving.metrics import ServerMetrics
from tidegate.engines.serving.secret import LaunchSecret
from tidegate.engines.serving.server import EngineServer, Parts
from tidegate.policies.order import Ticket
from tidegate.protocol.chunks import Tokens

HOPELESS = Ticket(arrival_s=-1.0, deadline_s=-0.5, work_s=0.3)
FEASIBLE = Ticket(arrival_s=-0.1, deadline_s=3600.0, work_s=0.01)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def is_reached(spoke: list[str], count: int) -> bool:
    return len(spoke) == count


class Said:
    """A ``TokensSink`` that notes who spoke."""

    def __init__(self, name: str, spoke: list[str]) -> None:
        self._name, self._spoke = name, spoke

    def tokens(self, tokens: Tokens) -> None:
        if tokens.token_ids:
            self._spoke.append(self._name)

    def plain(self, text: str, token_ids: list[int]) -> None:
        self._spoke.append(self._name)


@asynccontextmanager
async def serving(engine: EmbeddedEngine) -> AsyncIterator[tuple[DialectEngine, Callable[[], None]]]:
    """Serve an engine whose loop does not run; yield its client and what makes it take one step."""
    router = OutputRouter(asyncio.get_running_loop())
    parts = Parts(
        engine=engine,
        codec=engine.tokenizer,
        facts=FACTS,
        secret=LaunchSecret("s3"),
        metrics=ServerMetrics(FACTS, engine.stats),
        router=router,
        release_source=lambda source: None,
    )
    server = EngineServer(parts)
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    client = DialectEngine("i0", url, "tiny", connect_s=2.0, stall_s=60.0, secret="s3")
    await server.start(listener)
    try:
        yield client, lambda: router.sink(engine.step().outputs)
    finally:
        client.close("the test ends")
        await server.stop(0.0)


async def waiting(
    engine: EmbeddedEngine, client: DialectEngine, legs: Sequence[Leg], spoke: list[str]
) -> list[asyncio.Task[LegEnd]]:
    """Send legs, each once the one before it waits in the engine; ``spoke`` is told who has tokens."""
    answers: list[asyncio.Task[LegEnd]] = []
    for leg in legs:
        sink = Said(leg.request_id, spoke)
        answers.append(asyncio.create_task(client.run(leg, sink, deadline_s=60.0)))
        await until(lambda: engine.stats().waiting == len(answers))
    return answers


@pytest.mark.parametrize(
    ("order", "first"),
    [("fifo", ["continued", "long", "short"]), ("feasible-first", ["continued", "short", "long"])],
)
async def test_a_short_request_that_can_be_in_time_overtakes_a_hopeless_long_one(
    model: Path, order: str, first: list[str]
) -> None:
    """All wait while the engine stands still, so that only its order decides. A leg that continues an answer
    goes first in any order."""
    engine = EmbeddedEngine(
        EngineConfig(model, dtype="float64", total_blocks=64, max_num_seqs=1, order=order)
    )
    legs = [
        Leg("long", list(range(5, 55)), None, 1, {"temperature": 0}, ticket=HOPELESS),
        Leg("short", [5, 6, 7], None, 1, {"temperature": 0}, ticket=FEASIBLE),
        Leg("continued", [5, 6, 7, 8], None, 1, {"temperature": 0}, generated=1),
    ]
    spoke: list[str] = []
    async with serving(engine) as (client, step):
        answers = await waiting(engine, client, legs, spoke)
        for served in (1, 2, 3):
            step()
            await until(partial(is_reached, spoke, served))
        await asyncio.gather(*answers)
    assert spoke == first


@pytest.mark.parametrize(("order", "together"), [("fifo", ["long", "short"]), ("length-aware", ["short"])])
async def test_a_long_prompt_shares_no_step_while_few_wait(
    model: Path, order: str, together: list[str]
) -> None:
    engine = EmbeddedEngine(EngineConfig(model, dtype="float64", total_blocks=64, order=order))
    legs = [
        Leg("long", list(range(5, 55)), None, 1, {"temperature": 0}, ticket=Ticket(0.0, 9.0, 0.05, 50, 20.0)),
        Leg("short", [5, 6, 7], None, 1, {"temperature": 0}, ticket=Ticket(0.0, 9.0, 0.01, 3, 20.0)),
    ]
    spoke: list[str] = []
    async with serving(engine) as (client, step):
        answers = await waiting(engine, client, legs, spoke)
        step()
        await until(partial(is_reached, spoke, len(together)))
        assert engine.stats().waiting == len(legs) - len(together)
        step()
        await asyncio.gather(*answers)
    assert spoke[: len(together)] == together and len(spoke) == len(legs)
