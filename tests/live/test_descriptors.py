"""A gateway with few file descriptors: clients are told, no engine is blamed, newcomers are served."""

from __future__ import annotations

import asyncio
import os
import re
import resource
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson
import pytest

from tidegate.protocol.descriptors import raise_descriptor_limit

pytestmark = pytest.mark.slow
CUT_OFF = "cut off"
TOLD_LATE = "the head was out before descriptors ran out"


@dataclass
class Few:
    """A gateway with few descriptors, and the lines that it printed."""

    url: str
    client: aiohttp.ClientSession
    lines: list[str] = field(default_factory=list)
    engines: list[str] = field(default_factory=list)

    async def ask(self, tokens: int) -> int | str:
        """Stream a completion; return after its end its status, or how else it ended."""
        body = {"prompt": [7] * 200, "max_tokens": tokens, "stream": True}
        try:
            async with self.client.post(self.url + "/v1/completions", data=orjson.dumps(body)) as response:
                sent = await response.read()
        except aiohttp.ClientConnectionError:
            return CUT_OFF
        if response.status == 200 and not sent.endswith(b"data: [DONE]\n\n"):
            assert b'"code":"no_descriptors"' in sent[-300:], sent[-300:]
            return TOLD_LATE
        if response.status == 503:
            assert orjson.loads(sent)["error"]["code"] == "no_descriptors"
        return response.status

    async def ask_many(self, count: int, tokens: int, *, per_s: float) -> Counter[int | str]:
        asked = []
        for _ in range(count):
            asked.append(asyncio.create_task(self.ask(tokens)))
            await asyncio.sleep(1 / per_s)
        return Counter(await asyncio.gather(*asked))

    async def state(self) -> dict[str, Any]:
        async with self.client.get(self.url + "/tidegate/state") as response:
            assert response.status == 200
            answer: dict[str, Any] = await response.json()
            return answer

    async def check(self) -> None:
        """No engine was blamed or lost, and each process told it once at most. Engines may be busy."""
        state = await self.state()
        assert [each["engine_id"] for each in state["instances"]] == self.engines
        async with self.client.get(self.url + "/metrics") as response:
            replays = set(re.findall(r'tidegate_replays_total{reason="(\w+)"}', await response.text()))
        assert replays <= {"engine_busy"}
        told = Counter(" | " in line for line in self.lines if "connections open" in line)
        assert all(count == 1 for count in told.values()), self.lines


@asynccontextmanager
async def few(soft: int, hard: int | None, *options: str) -> AsyncIterator[Few]:
    """Serve emulated instances from a process with these limits of open files."""
    raise_descriptor_limit()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    limits = (soft, most if hard is None else hard)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tidegate", "serve", "--port", "0", "--admission", "0", *options),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limits),
    )
    assert process.stdout is not None
    lines: list[str] = []
    up: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def read(stream: asyncio.StreamReader) -> None:
        while line := await stream.readline():
            lines.append(line.decode())
            found = re.match(r"serving on (http://127\.0\.0\.1:\d+)/v1", lines[-1])
            if found:
                up.set_result(found[1])
        if not up.done():
            up.set_exception(AssertionError("serve ended early: " + "".join(lines)))

    reading = asyncio.create_task(read(process.stdout))
    try:
        url = await up
        timeout = aiohttp.ClientTimeout(total=None)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as client:
            served = Few(url, client, lines)
            served.engines = [each["engine_id"] for each in (await served.state())["instances"]]
            yield served
    finally:
        if process.returncode is None:
            os.kill(process.pid, signal.SIGTERM)
        await process.wait()
        await reading


TWO = ("--emulate", "h100_sxm/llama-3.1-8b:2", "--split", "1:1", "--system", "static")
SIXTY_FOUR = ("--emulate", "h100_sxm/llama-3.1-8b:64", "--system", "arrow-lending")


@pytest.mark.parametrize("hard", [None, 1024])
async def test_1200_requests_with_1024_descriptors(hard: int | None) -> None:
    async with few(1024, hard, *TWO) as served:
        statuses = await served.ask_many(1200, 400, per_s=60)
        if hard is None:
            assert statuses == {200: 1200}, "the soft limit is raised"
        else:
            assert statuses.keys() <= {200, 503, CUT_OFF, TOLD_LATE} and statuses[200] >= 480, statuses
        await served.check()
        assert await served.ask(2) == 200


async def test_1100_idle_connections_shut_nobody_out() -> None:
    async with few(1024, 1024, *TWO) as served:
        stream = asyncio.create_task(served.ask(2000))
        while not (await served.state())["requests"]["in_flight"]:
            await asyncio.sleep(0.05)
        host, port = served.url.removeprefix("http://").split(":")
        idle = [await asyncio.open_connection(host, port) for _ in range(1100)]
        assert await served.ask_many(200, 5, per_s=60) == {200: 200}
        assert await stream == 200
        await served.check()
        for _, writer in idle:
            writer.close()


@pytest.mark.parametrize(("descriptors", "options"), [(64, TWO), (256, SIXTY_FOUR)])
async def test_healthy_engines_outlive_a_burst_that_there_are_no_descriptors_for(
    descriptors: int, options: tuple[str, ...]
) -> None:
    async with few(descriptors, descriptors, *options) as served:
        statuses = await served.ask_many(600, 1000, per_s=1000)
        assert statuses.keys() <= {200, 503, CUT_OFF, TOLD_LATE} and statuses[200] >= 8, statuses
        await served.check()
        assert [await served.ask(2) for _ in range(20)] == [200] * 20
