"""The load of ``vllm_soak.py``: requests of every kind, clients that leave anywhere, answers compared."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

import aiohttp

from tidegate.core.errors import ClientGone, status_of
from vllm_client import CHAT, COMPLETIONS, Answer, Json, ask, client

LETTERS = "abcdefghij klmnop. éüß 漢字 Жд 😀"
REFERENCES_AT_ONCE = 8
LEAVING = 0.35
"""Share of the clients that leave before the end of their answer."""
SESSIONS = 100
"""Names of conversations; each is used again and again, as a gateway remembers conversations."""
TYPICAL_S = 1.0
"""How long a request is taken to last before any has ended."""


@dataclass
class Round:
    """A request, and what one server alone answers; ``expected`` is None for one that samples."""

    path: str
    body: Json
    expected: Answer | None = None


class Left(Exception):
    """The client has what it waited for, and goes."""


async def draw_conversations(url: str, count: int, rng: random.Random) -> list[list[Round]]:
    """Draw ``count`` conversations of one or two rounds, and have the server at ``url`` answer them alone."""
    free = asyncio.Semaphore(REFERENCES_AT_ONCE)
    drawn = [_first_round(rng) for _ in range(count)]
    more = [[rng.randrange(5, 512) for _ in range(rng.randint(1, 60))] for _ in range(count)]

    async def answered(session: aiohttp.ClientSession, first: Round, extra: list[int]) -> list[Round]:
        rounds = [first]
        async with free:
            await _reference(session, url, first)
            if first.expected is not None and first.path == COMPLETIONS and extra[0] % 3 == 0:
                prompt = [*first.body["prompt"], *first.expected.ids, *extra]
                second = Round(first.path, {**first.body, "prompt": prompt, "max_tokens": 40})
                await _reference(session, url, second)
                rounds.append(second)
        return rounds

    async with client() as session:
        return list(
            await asyncio.gather(*(answered(session, *pair) for pair in zip(drawn, more, strict=True)))
        )


async def _reference(session: aiohttp.ClientSession, url: str, one: Round) -> None:
    if one.body["temperature"]:
        return
    alone = {**one.body, "cache_salt": "reference"}
    answer = await ask(session, url + one.path, alone, Answer())
    if answer.status != 200 or answer.error:
        raise SystemExit(f"{url} answers {answer.status} by itself: {answer.error}")
    one.expected = answer


def _first_round(rng: random.Random) -> Round:
    length, body = rng.randint(3, 600), Json()
    body |= {"model": "tiny", "return_token_ids": True, "ignore_eos": rng.random() < 0.7}
    body["max_tokens"] = 1 if rng.random() < 0.05 else rng.randint(2, 160)
    kind = rng.random()
    body["temperature"] = 0.8 if kind < 0.12 else 0
    if kind < 0.04:
        body["seed"] = 7  # Its state cannot move.
    if rng.random() < 0.35:
        text = "".join(rng.choice(LETTERS) for _ in range(length // 2))
        return Round(CHAT, body | {"messages": [{"role": "user", "content": text}]})
    if rng.random() < 0.2:
        body["stop"] = [rng.choice("abcdefghij") for _ in range(2)]
    return Round(COMPLETIONS, body | {"prompt": [rng.randrange(5, 512) for _ in range(length)]})


@dataclass
class Load:
    """Keeps ``at_once`` conversations open against a gateway, and counts what becomes of their requests."""

    url: str
    conversations: list[list[Round]]
    rng: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    longest_gap_s: float = 0.0
    _typical_s: float = TYPICAL_S
    _number: int = 0

    async def run(self, at_once: int, stop: asyncio.Event) -> None:
        """Send until ``stop`` is set; return once the last answer came."""
        async with client() as polite, client(abrupt=True) as abrupt, asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(self._converse([polite, abrupt], stop))

    async def _converse(self, sessions: list[aiohttp.ClientSession], stop: asyncio.Event) -> None:
        rng = self.rng
        while not stop.is_set():
            self._number += 1
            session = f"session-{rng.randrange(SESSIONS)}" if rng.random() < 0.4 else ""
            # Of the others, half are new to all prefix caches.
            known = session or (f"known-{rng.randrange(3)}" if rng.random() < 0.5 else "")
            headers = {"x-session-id": session} if session else {}
            for one in rng.choice(self.conversations):
                salted = {**one.body, "cache_salt": known or f"new-{self._number}"}
                await self._request(rng.choice(sessions), one, salted, headers)

    async def _request(
        self, session: aiohttp.ClientSession, one: Round, body: Json, headers: dict[str, str]
    ) -> None:
        rng, answer, loop = self.rng, Answer(), asyncio.get_running_loop()
        if rng.random() < 0.6:
            body["stream"] = True
        leaves_s, leaves_at = self._when_to_leave(body)

        def leave_there() -> None:
            if leaves_at is not None and len(answer.ids) >= leaves_at:
                raise Left

        began_s = loop.time()
        gone = False
        try:
            async with asyncio.timeout(leaves_s):
                await ask(session, self.url + one.path, body, answer, headers=headers, on_piece=leave_there)
        except Left:
            gone = True
        except TimeoutError:
            gone = leaves_s is not None
            answer.error = answer.error or ("" if gone else "no answer in time")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            answer.error = answer.error or repr(error)
        self._count(one, answer, gone)
        if not gone:
            self._typical_s += 0.05 * (loop.time() - began_s - self._typical_s)
        gaps = [late - early for early, late in pairwise(answer.at_s)]
        self.longest_gap_s = max(self.longest_gap_s, *gaps, 0.0)

    def _when_to_leave(self, body: Json) -> tuple[float | None, int | None]:
        """Return after how many seconds the client leaves, or behind how many tokens; None, None to stay."""
        rng = self.rng
        if rng.random() >= LEAVING:
            return None, None
        where = rng.random()
        if where < 0.3:
            return rng.uniform(0.0, 0.05), None
        if not body.get("stream") or where < 0.45:
            return rng.uniform(0.0, 1.2 * self._typical_s), None
        # Behind the first token its KV moves.
        return None, 1 if where < 0.7 else rng.randint(2, max(2, body["max_tokens"]))

    def _count(self, one: Round, answer: Answer, gone: bool) -> None:
        counts = self.counts
        counts["sent"] += 1
        if gone:
            counts["left"] += 1
        elif answer.status != 200 or answer.error:
            counts["errors"] += 1
            self._note(f"{answer.status} {answer.error or 'no answer'}: {one.path} {str(one.body)[:200]}")
            return
        else:
            counts["whole"] += 1
        if one.expected is None:
            return
        counts["compared"] += 1
        if not (answer.begins(one.expected) if gone else answer.told == one.expected.told):
            counts["wrong"] += 1
            self._note(f"{one.path} {str(one.body)[:200]}: {answer.told} is not {one.expected.told}")

    def _note(self, problem: str) -> None:
        if len(self.problems) < 20:
            self.problems.append(problem)


def where_clients_left(outcomes: list[Json]) -> Counter[str]:
    """Count the journal's outcomes of requests whose client left by how far they had come."""
    gone: Counter[str] = Counter()
    for row in outcomes:
        if row["outcome"] == status_of(ClientGone("")).label:
            tokens = row["output_length"]
            gone["before a token" if tokens == 0 else "at the first" if tokens == 1 else "later"] += 1
            gone["after a migration"] += row["migrations"] > 0
    return gone
