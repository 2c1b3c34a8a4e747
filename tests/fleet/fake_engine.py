"""A stand-in for an engine process: announces itself, answers /health, obeys the environment.

FAKE_ENGINE selects what it does: ``serve`` (the default), ``crash`` (writes to stderr and exits 3),
``mute`` (never announces), ``loading`` (says what it does, and never announces), ``garbled`` (announces half
a line), ``stubborn`` (ignores SIGTERM), ``once:PATH`` (serves only if it can create PATH, else crashes),
``slow:PATH`` (the same, else is mute).
``GET /hang`` makes every later /health wait for ever; ``GET /secret`` returns the launch secret.
"""

# ruff: noqa: T201 - what it prints is its interface

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from pathlib import Path

from aiohttp import web

SAMPLES = [
    *(
        {"kind": "prefill", "new_tokens": n, "cached_tokens": 0, "seconds": 0.01 + 1e-4 * n}
        for n in (16, 64, 256, 512)
    ),
    *(
        {"kind": "step", "batch": b, "context_tokens": 100 * b, "seconds": 0.01 + 1e-3 * b}
        for b in (1, 2, 4, 8)
    ),
]


async def serve(engine_id: str, model: str) -> None:
    hanging = False

    async def health(_: web.Request) -> web.Response:
        if hanging:
            await asyncio.Event().wait()
        return web.Response()

    async def hang(_: web.Request) -> web.Response:
        nonlocal hanging
        hanging = True
        return web.Response()

    async def secret(_: web.Request) -> web.Response:
        return web.Response(text=os.environ.get("TIDEGATE_LAUNCH_SECRET", ""))

    app = web.Application()
    app.add_routes([web.get("/health", health), web.get("/hang", hang), web.get("/secret", secret)])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    ready = {
        "event": "ready",
        "port": runner.addresses[0][1],
        "kv_port": 1,
        "engine_id": engine_id,
        "pid": os.getpid(),
        "model": model,
        "max_model_len": 2048,
        "kv_capacity_tokens": 4096,
        "block_tokens": 16,
        "kv_bytes_per_token": 64,
        "profile_samples": SAMPLES,
    }
    print("a line that a library printed")
    print(json.dumps(ready), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine-id", required=True)
    parser.add_argument("--served-model-name", required=True)
    flags, _ = parser.parse_known_args()
    mode, _, path = os.environ.get("FAKE_ENGINE", "serve").partition(":")
    if mode in ("once", "slow"):
        try:
            Path(path).touch(exist_ok=False)
        except FileExistsError:
            mode = {"once": "crash", "slow": "mute"}[mode]
    if mode == "crash":
        print("loading weights", file=sys.stderr)
        print("RuntimeError: no such weights", file=sys.stderr)
        sys.exit(3)
    if mode == "loading":
        print("tidegate-stage: loading the model", flush=True)
    if mode in ("mute", "loading"):
        sys.stdin.read()
        return
    if mode == "garbled":
        print('{"event": "ready", "port": 0}', flush=True)
        sys.stdin.read()
        return
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    asyncio.run(serve(flags.engine_id, flags.served_model_name))


if __name__ == "__main__":
    main()
