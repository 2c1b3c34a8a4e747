"""Instances as processes, for tests that need two of them and a real model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from tidegate.protocol.chunks import SseParser

SECRET = "launch-secret"
START_S = 60.0
EXIT_S = 15.0


class EngineProcess:
    """One server process. ``wait_ready`` reads its announcement; ``close`` always reaps it."""

    def __init__(self, model: Path, name: str, *flags: str) -> None:
        command = [sys.executable, "-m", "tidegate.engines.embedded", "--model", str(model)]
        command += ["--engine-id", name, "--served-model-name", "tiny", "--dtype", "float64", *flags]
        command += ["--exit-with-parent", "--no-self-profile", "--log-level", "warning"]
        environment = {**os.environ, "TIDEGATE_LAUNCH_SECRET": SECRET, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self.name = name
        self.ready: dict[str, Any] = {}

    def wait_ready(self) -> EngineProcess:
        assert self.process.stdout is not None
        watchdog = threading.Timer(START_S, self.process.kill)
        watchdog.start()
        line = self.process.stdout.readline()
        watchdog.cancel()
        assert line, f"{self.name} ended before it was ready"
        self.ready = orjson.loads(line)
        return self

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ready['port']}"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(EXIT_S)

    def close(self) -> int:
        """Ask the process to end; return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(EXIT_S)
        finally:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    pipe.close()


class Client:
    """Calls instances as a member of the launch."""

    def __init__(self) -> None:
        self.session = aiohttp.ClientSession(
            headers={"x-tidegate-secret": SECRET},
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=60),
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.session.close()

    async def complete(
        self, at: EngineProcess, prompt: list[int], max_tokens: int, kv: Any = None, **more: Any
    ) -> dict[str, Any]:
        """Return the whole answer of a completion."""
        body = completion(prompt, max_tokens, kv, **more)
        async with self.session.post(f"{at.url}/v1/completions", json=body) as answer:
            value: dict[str, Any] = await answer.json()
            assert answer.status == 200, value
            return value

    async def stream(
        self, at: EngineProcess, prompt: list[int], max_tokens: int, kv: Any = None, **more: Any
    ) -> tuple[list[int], str, dict[str, Any]]:
        """Return ids, text and the last event of a streamed completion."""
        body = completion(prompt, max_tokens, kv, stream=True, **more)
        async with self.session.post(f"{at.url}/v1/completions", json=body) as answer:
            assert answer.status == 200, await answer.text()
            payloads = SseParser().feed(await answer.read())
        assert payloads[-1] == b"[DONE]"
        events = [orjson.loads(payload) for payload in payloads[:-1]]
        ids = [i for event in events for i in event["choices"][0]["token_ids"]]
        return ids, "".join(event["choices"][0]["text"] for event in events), events[-1]

    async def stats(self, at: EngineProcess) -> dict[str, Any]:
        async with self.session.get(f"{at.url}/tidegate/stats") as answer:
            value: dict[str, Any] = await answer.json()
            return value


def completion(prompt: list[int], max_tokens: int, kv: Any = None, **more: Any) -> dict[str, Any]:
    """Return a greedy completion's body."""
    body = {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **more,
    }
    return body if kv is None else {**body, "kv_transfer_params": kv}


def said(answer: dict[str, Any]) -> list[int]:
    """Return the token ids of a whole answer."""
    ids: list[int] = answer["choices"][0]["token_ids"]
    return ids


def swapped(handle: dict[str, Any], generated: int = 0) -> dict[str, Any]:
    """Return the handle as the next lease sends it: pull, then pin again."""
    return {
        **handle,
        "do_remote_decode": True,
        "do_remote_prefill": False,
        "tidegate_generated": generated,
    }
