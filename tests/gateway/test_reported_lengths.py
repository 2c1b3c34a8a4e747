"""What an engine predicts of a running decode, from its stream to what policies see."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from tests.gateway.gateway_cluster import Start


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_a_prediction_in_a_stream_is_in_the_next_snapshot(start: Start, path: str) -> None:
    cluster = await start("ares")
    plane = cluster.gateway.dispatcher.plane

    def predicts_once_and_stops(engine_id: str, generated: int) -> float | None:
        if generated == 10:
            cluster.engines[engine_id].step_s = 1e6
        return 300.0 if generated == 3 else None

    for name, engine in cluster.engines.items():
        engine.remaining = partial(predicts_once_and_stops, name)
    body = {"prompt": "The tide", "messages": [{"role": "user", "content": "The tide"}], "max_tokens": 4000}
    body.pop("messages" if "chat" not in path else "prompt")
    answer = asyncio.create_task(cluster.stream(body, path))
    await cluster.until(lambda: plane.snapshot(0.0).requests.answer_tokens.tolist() == [10])
    rows = plane.snapshot(0.0).requests
    assert rows.remaining_tokens.tolist() == [300.0 - 7]
    assert rows.remaining_low_tokens[0] < 293.0 < rows.remaining_high_tokens[0]
    assert plane.lengths is not None and plane.lengths.absurd == 0
    answer.cancel()


async def test_clients_see_no_predictions_and_absurd_ones_are_counted(start: Start) -> None:
    cluster = await start("ares")
    for engine in cluster.engines.values():
        engine.remaining = lambda generated: -1.0 if generated == 4 else 5.0
    events = await cluster.stream({"prompt": "The tide", "max_tokens": 8})
    assert len(events) >= 8 and not any(event.keys() & {"remaining_tokens", "at_token"} for event in events)
    lengths = cluster.gateway.dispatcher.plane.lengths
    assert lengths is not None and lengths.absurd == 1
