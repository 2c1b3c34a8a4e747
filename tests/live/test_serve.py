"""``tidegate serve`` as a user runs it: a process, its engines, many clients, an end without orphans."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest

from tidegate.cli.instance_keys import shared_key
from tidegate.journal import read_journal


class Served:
    """A running ``tidegate serve``."""

    def __init__(self, process: asyncio.subprocess.Process, url: str, client: aiohttp.ClientSession) -> None:
        self.process = process
        self.url = url
        self.client = client

    async def state(self) -> dict[str, Any]:
        async with self.client.get(self.url + "/tidegate/state") as response:
            answer: dict[str, Any] = orjson.loads(await response.read())
            return answer

    async def stream(self, body: dict[str, Any], leave_after: int | None = None) -> int:
        """Stream a completion and return its token count; with ``leave_after``, hang up after that many."""
        count = 0
        body = body | {"stream": True, "return_token_ids": True}
        async with self.client.post(self.url + "/v1/completions", data=orjson.dumps(body)) as response:
            assert response.status == 200, await response.text()
            async for line in response.content:
                if line.startswith(b"data: {"):
                    event = orjson.loads(line[6:])
                    assert "error" not in event, event
                    count += len(event["choices"][0]["token_ids"])
                if leave_after is not None and count >= leave_after:
                    response.close()
                    return count
        return count

    async def until_idle(self) -> None:
        """Wait until the ledger is empty and every engine has all its KV blocks back."""
        async with asyncio.timeout(60):
            while True:
                state = await self.state()
                usage = [await self._kv_usage(i["url"]) for i in state["instances"]]
                if state["requests"]["in_flight"] == 0 and not any(usage):
                    return
                await asyncio.sleep(0.1)

    async def _kv_usage(self, url: str) -> float:
        known = shared_key([url])
        assert known is not None
        headers = {"Authorization": f"Bearer {known.api_key}"}
        async with self.client.get(url + "/metrics", headers=headers) as response:
            text = await response.text()
        found = re.search(r"^vllm:kv_cache_usage_perc(?:{.*})? (\S+)$", text, re.MULTILINE)
        assert found
        return float(found[1])


@pytest.fixture(params=[(), ("--system", "arrow-lending")], ids=["default", "handing over"])
async def served(request: pytest.FixtureRequest, model_dir: Path, tmp_path: Path) -> AsyncIterator[Served]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tidegate", "serve", "--model", str(model_dir), "--port", "0"),
        *request.param,
        *("--journal", str(tmp_path / "run.jsonl"), "--admission", "0"),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    text = ""
    while not (found := re.search(r"(http://127\.0\.0\.1:\d+)/v1", text.partition("serving on")[2])):
        line = await process.stdout.readline()
        assert line, f"serve ended early: {text}"
        text += line.decode()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client:
        yield Served(process, found[1], client)
    if process.returncode is None:
        process.kill()
        await process.wait()


def peak_memory_mb(pid: int) -> float:
    """Peak resident memory of a process."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) / 1024


async def test_500_streams_an_abort_storm_and_a_clean_stop(served: Served, tmp_path: Path) -> None:
    bodies = [
        {"prompt": [7 + n % 400] * (4 + n % 60), "max_tokens": 12, "ignore_eos": True} for n in range(500)
    ]
    assert await asyncio.gather(*(served.stream(b) for b in bodies)) == [12] * 500
    assert peak_memory_mb(served.process.pid) < 300

    await asyncio.gather(
        *(served.stream(b | {"max_tokens": 500}, leave_after=1 + n % 5) for n, b in enumerate(bodies[:120]))
    )
    await served.until_idle()

    pids = [i["pid"] for i in (await served.state())["instances"]]
    assert len(pids) == 3
    served.process.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(served.process.wait(), 30) == 0
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    journal = read_journal(tmp_path / "run.jsonl")
    ended = [o.outcome for o in journal.outcomes]
    assert sorted(set(ended)) == ["client_gone", "ok"]
    assert (ended.count("ok"), ended.count("client_gone")) == (500, 120)
