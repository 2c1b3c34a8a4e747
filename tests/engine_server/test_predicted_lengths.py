"""Predicted lengths on their way from an engine to the gateway: one event in many has one."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from tests.engine_server.engine_fakes import Served
from tidegate.engines.dialect import DialectEngine
from tidegate.engines.seam import Json, Leg
from tidegate.protocol.chunks import Tokens

HELLO: list[Json] = [{"role": "user", "content": "hi"}]


@dataclass
class Heard:
    ids: list[int] = field(default_factory=list)
    forecasts: list[tuple[int, float]] = field(default_factory=list)

    def tokens(self, tokens: Tokens) -> None:
        self.ids += tokens.token_ids
        if tokens.forecast is not None:
            self.forecasts.append(tokens.forecast)

    def plain(self, text: str, token_ids: list[int]) -> None:
        self.ids += token_ids


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("pin", [False, True])
async def test_forecasts_reach_the_gateway_with_their_tokens(chat: bool, pin: bool) -> None:
    prompt, messages = (None, HELLO) if chat else ([1, 2, 3], None)
    last = 1 if pin else 5
    async with Served("s3") as served:
        served.engine.predicts = {1: 30.0, 3: 12.5}
        client = DialectEngine("i0", served.url, "tiny", connect_s=2.0, stall_s=60.0, secret="s3")
        heard = Heard()
        await client.run(Leg("r", prompt, messages, last, {}, pin=pin), heard, deadline_s=30.0)
        client.close("the test ends")
    assert heard.ids == list(range(100, 100 + last))
    assert heard.forecasts == ([(1, 30.0)] if pin else [(1, 30.0), (3, 12.5)])


@pytest.mark.parametrize("remaining", [None, 250.5])
async def test_the_load_report_has_them_where_there_is_a_predictor(remaining: float | None) -> None:
    async with Served() as served:
        served.engine.remaining_tokens = remaining
        async with served.client.get("/metrics") as answer:
            lines = (await answer.text()).splitlines()
        said = [line.split()[-1] for line in lines if line.startswith("tidegate:remaining_tokens{")]
        assert said == ([] if remaining is None else ["250.5"])
        async with served.client.get("/tidegate/stats") as answer:
            assert (await answer.json())["remaining_tokens"] == remaining
