"""Is history reused? Conversations on live embedded engines, and what of it was computed again.

Run: ``PYTHONPATH=src:testkit python benchmarks/sessions.py`` (a minute or two per row on two cores). The
engines have a tiny random model. Every row is one way of placing later rounds:

- ``local``: where the history is; ``remote``: elsewhere, with the history read; ``either``: drawn;
- ``blind``: elsewhere, without reading, decoded anywhere: what history is worth.

``hits`` are the tokens that a session cache which forgets nothing would hit, ``again`` how many of them
engines computed again, for themselves or to have them read, ``reused`` the share of the others. ``predicted``
sums what the prefix index expected of prefills, ``reported`` what the engines said; ``off`` is their relative
difference. ``moved`` counts migrations, ``read`` tokens of history read.

With ``--chats`` clients send messages instead of ids, with ``--unnamed`` no session id.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from itertools import takewhile
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from tidegate.engines.embedded.tiny_model import make_tiny_model
from tidegate.fleet.processes import EngineLaunch, LocalFleet
from tidegate.gateway.run import Gateway
from tidegate.gateway.settings import GatewaySettings
from tidegate_testing.chaos import Forced, chaos
from tidegate_testing.rounds import anywhere, rounds_of

WAYS = {
    "local": (1.0, 1.0, 1.0),
    "remote": (0.0, 1.0, 1.0),
    "either": (0.5, 1.0, 1.0),
    "blind": (0.0, 0.0, 0.0),
}
OPEN = 12


async def converse(
    url: str, client: aiohttp.ClientSession, session: int, args: argparse.Namespace
) -> tuple[int, int]:
    """Hold a conversation; return how much a session cache that forgets nothing would hit, and would not."""
    history: list[int] = []
    messages: list[dict[str, str]] = []
    hits = asked = 0
    path = "/v1/chat/completions" if args.chats else "/v1/completions"
    headers = {} if args.unnamed else {"x-session-id": f"s{session}"}
    for said, tokens in rounds_of(session, args.rounds, args.first, args.more):
        messages.append({"role": "user", "content": " ".join(map(str, said[: len(said) // 4]))})
        body: dict[str, Any] = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        body["return_token_ids"] = True
        body |= {"messages": messages} if args.chats else {"prompt": history + said}
        async with client.post(url + path, data=orjson.dumps(body), headers=headers) as answer:
            assert answer.status == 200, await answer.text()
            whole = orjson.loads(await answer.read())
        choice = whole["choices"][0]
        prompt = whole["prompt_token_ids"] if args.chats else choice["prompt_token_ids"]
        pairs = zip(history[:-1], prompt[:-1], strict=False)  # the last has no KV, and is computed
        hits += sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        asked += len(prompt)
        history = prompt + choice["token_ids"]
        messages.append({"role": "assistant", "content": choice["message"]["content"] if args.chats else ""})
    return hits, asked - hits


async def computed(gateway: Gateway, client: aiohttp.ClientSession) -> int:
    """Return how many prompt tokens the engines computed, for whatever reason."""
    total = 0
    for upstream in gateway.dispatcher.upstreams.values():
        headers = {"x-tidegate-secret": upstream.member.secret}
        async with client.get(upstream.member.url + "/tidegate/stats", headers=headers) as answer:
            total += (await answer.json())["computed_prompt_tokens"]
    return total


async def measure(way: str, model: Path, journal: Path, args: argparse.Namespace) -> None:
    """Print a row."""
    launch = EngineLaunch(model=model, instances=args.instances, kv_memory_mb=args.kv_memory_mb, zygote=True)
    settings = GatewaySettings(port=0, admission=0.0, journal=journal)
    gateway = Gateway(settings, LocalFleet(launch), anywhere(1, *WAYS[way]))
    forced = Forced(migrate_every_s=args.migrate_every_s)
    try:
        url = await gateway.start()
        async with aiohttp.ClientSession() as client, chaos(gateway.dispatcher, forced):
            gate = asyncio.Semaphore(OPEN)

            idle = await computed(gateway, client)

            async def one(session: int) -> tuple[int, int]:
                async with gate:
                    return await converse(url, client, session, args)

            told = await asyncio.gather(*(one(session) for session in range(args.sessions)))
            hits, new = (sum(counts) for counts in zip(*told, strict=True))
            again = await computed(gateway, client) - idle - new
    finally:
        await gateway.stop()
    print_row(way, hits, again, gateway, journal, args)


def print_row(
    way: str, hits: int, again: int, gateway: Gateway, journal: Path, args: argparse.Namespace
) -> None:
    plane, prefixes = gateway.dispatcher.plane, gateway.dispatcher.prefixes
    rows = [orjson.loads(line) for line in journal.read_bytes().splitlines()]
    ends = [row for row in rows if row["type"] == "outcome"]
    read = sum(row.get("read_back_tokens", 0) for row in ends)
    predicted, reported = prefixes.predicted_tokens, prefixes.reported_tokens
    off = predicted / max(1, reported) - 1
    print(
        f"{way:8} {args.sessions:8} {hits:9} {again:9} {1 - again / hits:7.1%} {predicted:10} {reported:10} "
        f"{off:7.1%} {plane.migrations['done']:6} {read:9}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sessions", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--first", type=int, default=400, help="most tokens of a first message")
    parser.add_argument("--more", type=int, default=200, help="most tokens of a later message")
    parser.add_argument("--instances", type=int, default=3)
    parser.add_argument("--kv-memory-mb", type=int, default=64)
    parser.add_argument("--migrate-every-s", type=float, default=0.0)
    parser.add_argument("--chats", action="store_true")
    parser.add_argument("--unnamed", action="store_true")
    parser.add_argument("--ways", default=",".join(WAYS))
    args = parser.parse_args()
    heads = ("way", "sessions", "hits", "again", "reused", "predicted", "reported", "off", "moved", "read")
    print("{:8} {:>8} {:>9} {:>9} {:>7} {:>10} {:>10} {:>7} {:>6} {:>9}".format(*heads))
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "tiny"
        make_tiny_model(model)
        for way in args.ways.split(","):
            asyncio.run(measure(way, model, Path(folder) / f"{way}.jsonl", args))


if __name__ == "__main__":
    main()
