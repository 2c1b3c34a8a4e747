"""Sessions as clients play them: a turn waits for the answer before it, and repeats it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.bench.fake_openai import DEFAULTS, FakeOpenAI, Offer
from tidegate.bench.settings import PromptForm
from tidegate.core.errors import ConfigError
from tidegate.measure.results import read_results
from tidegate.workloads.trace import TraceRecord

SESSIONS = replace(DEFAULTS, sessions=True)
TURNS = ((6, 2), (12, 3), (20, 2))


def rounds(session: str, at_s: float = 0.0) -> list[TraceRecord]:
    return [
        TraceRecord(at_s, prompt, answer, session_id=session, turn=k, delay_s=0.0 if k else None)
        for k, (prompt, answer) in enumerate(TURNS)
    ]


@dataclass
class Talking(FakeOpenAI):
    """Knows whether an answer of a session was still under way when its next turn came."""

    open: set[str] = field(default_factory=set)
    overlapped: int = 0

    async def _stream(
        self, request: web.Request, body: dict[str, Any], usage: dict[str, int], plan: str
    ) -> web.StreamResponse:
        session = request.headers["x-session-id"]
        self.overlapped += session in self.open
        self.open.add(session)
        try:
            return await super()._stream(request, body, usage, plan)
        finally:
            self.open.discard(session)


async def test_a_turn_waits_for_the_answer_and_repeats_it_as_ids(offer: Offer, tmp_path: Path) -> None:
    fake = Talking(ids=True)
    records = [*rounds("a"), *rounds("b")]
    out = tmp_path / "run.jsonl"
    done = await offer(fake, records, settings=SESSIONS, out=out)
    assert done.report.outcomes == {"ok": 6} and not fake.overlapped
    for session in ("a", "b"):
        bodies = [b for b, h in zip(fake.bodies, fake.headers, strict=True) if h["x-session-id"] == session]
        assert [len(body["prompt"]) for body in bodies] == [prompt for prompt, _ in TURNS]
        for before, after in pairwise(bodies):
            said = before["prompt"] + fake.ids_of(before)
            assert after["prompt"][: len(said)] == said
    assert fake.bodies[0]["prompt"] != fake.bodies[1]["prompt"]
    found = read_results(out)
    assert found.header["sessions"] is True
    assert sorted(r.turn for r in found.results) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("chat", [False, True])
async def test_text_and_messages_repeat_answers_too(offer: Offer, chat: bool) -> None:
    fake = FakeOpenAI()
    settings = replace(SESSIONS, chat=chat, prompt_form=PromptForm.TEXT)
    await offer(fake, rounds("a"), settings=settings)
    last = fake.bodies[-1]
    if chat:
        assert [message["role"] for message in last["messages"]] == ["user", "assistant"] * 2 + ["user"]
        assert last["messages"][1]["content"] == " x x"
    else:
        assert last["prompt"].startswith(fake.bodies[0]["prompt"] + " x x ")
        assert len(last["prompt"].split()) == TURNS[-1][0]


async def test_an_endpoint_without_ids_of_answers_is_sent_text(offer: Offer) -> None:
    fake = FakeOpenAI()
    assert (await offer(fake, rounds("a"), settings=SESSIONS)).prompt_form == PromptForm.TEXT
    with pytest.raises(ConfigError, match="returns no ids of its answers"):
        await offer(fake, rounds("a"), settings=replace(SESSIONS, prompt_form=PromptForm.TOKENS))


async def test_a_session_goes_on_after_a_turn_that_failed_without_its_answer(offer: Offer) -> None:
    fake = FakeOpenAI(ids=True, plan=lambda size: "reject" if size == TURNS[1][0] else "ok")
    done = await offer(fake, rounds("a"), settings=SESSIONS)
    assert done.report.outcomes == {"ok": 2, "http 429": 1}
    assert fake.bodies[2]["prompt"][: TURNS[1][0]] == fake.bodies[1]["prompt"]


async def test_stopping_ends_a_pause(offer: Offer) -> None:
    fake = FakeOpenAI(ids=True)
    first, second, *_ = rounds("a")
    done = await offer(
        fake, [first, second._replace(delay_s=3600.0), *rounds("b", 0.0)], settings=SESSIONS, stop_at=4
    )
    assert done.interrupted and len(fake.bodies) == 4


async def test_a_workload_without_sessions_is_refused(offer: Offer) -> None:
    with pytest.raises(ConfigError, match="no turn of this workload waits"):
        await offer(FakeOpenAI(), [TraceRecord(0.0, 5, 1)], settings=SESSIONS)
