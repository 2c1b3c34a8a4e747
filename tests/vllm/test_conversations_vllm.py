"""Conversations on real servers, whose rounds are prefilled, decoded, moved and evicted anywhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from tests.vllm.through_gateway import COMPLETIONS, ask, client, serving
from tests.vllm.vllm_servers import SERVED_NAME, ServerOptions, Start
from tidegate_testing.chaos import Forced
from tidegate_testing.rounds import anywhere, converse

SESSIONS, ROUNDS, AT_ONCE = 30, 6, 8
SMALL = ServerOptions(kv_bytes=4 << 20, args=("--max-model-len", "1024"))
"""A cache of 2,048 tokens, which the conversations together outgrow several times."""


async def test_rounds_run_anywhere_say_what_one_server_says(start: Start, tmp_path: Path) -> None:
    cluster = start([SMALL] * 3)
    async with client() as session:

        def asks(url: str, **more: Any) -> Any:
            async def one(body: dict[str, Any], headers: Mapping[str, str]) -> list[int]:
                fixed = {"model": SERVED_NAME, "return_token_ids": True, "stream": True}
                said = await ask(session, url, COMPLETIONS, body | fixed | more, headers=headers)
                assert said.status == 200 and not said.error, said.error
                return said.ids

            return one

        alone = asks(cluster[0].url, cache_salt="alone")
        reference = await converse(alone, SESSIONS, ROUNDS, at_once=AT_ONCE, first=80, more=30)
        forced = Forced(migrate_every_s=0.1, seed=13)
        async with serving(
            cluster.urls, tmp_path, system=anywhere(13), forced=forced, trusted_proxies=("127.0.0.1",)
        ) as running:
            through = asks(running.url)
            told = await converse(through, SESSIONS, ROUNDS, at_once=AT_ONCE, first=80, more=30)
            moved = running.metric("tidegate_migrations_total", event="done")
            running.gateway.dispatcher.plane.ledger.check_integrity()
            outcomes = list(running.outcomes().values())
    assert told == reference
    rows = [orjson.loads(line) for line in running.journal.read_bytes().splitlines()]
    events = Counter(row["event"] for row in rows if row["type"] == "session")
    read = [row["read_back_tokens"] for row in outcomes if row.get("read_back_tokens")]
    assert moved > SESSIONS / 2 and len(read) > SESSIONS / 2
    assert events["bound"] > SESSIONS and events["evicted"] > 0
