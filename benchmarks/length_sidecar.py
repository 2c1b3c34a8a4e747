"""Whether a pooling instance of vLLM pays as a predictor of lengths, beside instances of vLLM that decode.

    python benchmarks/length_sidecar.py --model models/smollm2 --data collected --head head.safetensors

vLLM gives no hidden state of a request that it decodes. An instance that pools gives that of the last one of
any token ids, and has to read all of them that its prefix cache lacks. Three tables say what that is worth:

- how far predictions are off on held-out requests of a collection, by how often there is one;
- what a prediction takes on this machine, beside a decode step of the same model in the same vLLM: CPU
  seconds of all processes of a server. Before, states and predictions are compared with the collection's;
- the same from packaged profiles of GPUs.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import random
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import torch

from tidegate.costs.forms import attention_work
from tidegate.costs.library import packaged_profile
from tidegate.engines.embedded.length_head import LengthHead, load_head_for
from tidegate.engines.vllm.client import VllmClient
from tidegate.fleet.vllm import free_ports
from tidegate.predictor.baselines import histogram, median_left
from tidegate.predictor.compare import hidden_estimate, newest_estimate
from tidegate.predictor.dataset import Samples, Split, load_samples, split_requests
from tidegate.predictor.evaluate import Estimate, Evaluation
from tidegate_testing.vllm_cpu import on_cpu
from vllm_processes import ROOT, START_S, healthy

EVERY = (20, 100)
"""Tokens between two predictions."""
GROWN = 3
"""How often a text grows by as many."""
BLOCK_TOKENS = 32
STEPS = 20
POINTS = ((4, 256), (16, 256), (16, 1024))
"""Requests at once, and tokens of each."""
PROFILES = ("rtx_4090/llama-3.1-8b", "h100_sxm/llama-3.1-8b", "h100_sxm/llama-3.1-70b/tp4")
GPU_POINTS = ((16, 2048), (64, 2048), (32, 8192))
POOLING = ("--runner", "pooling", "--convert", "embed", "--pooler-config")
POOLER = {"pooling_type": "LAST", "use_activation": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="what `collect` wrote")
    parser.add_argument("--head", type=Path, required=True, metavar="FILE")
    parser.add_argument("--compared", type=int, default=32, help="states that are compared")
    parser.add_argument("--vllm-bin", type=Path, default=ROOT / ".venv-vllm" / "bin" / "vllm")
    parser.add_argument("--logs", type=Path, default=Path("runs/vllm-logs"))
    parser.add_argument("--no-servers", action="store_true", help="only what needs no vLLM")
    args = parser.parse_args()
    head, _ = load_head_for(args.head, args.model)
    samples = load_samples(args.data)
    split = split_requests(samples.index)
    errors_by_cadence(head, samples, split)
    if not args.no_servers:
        asyncio.run(measure(args, head, samples, split))
    for name in PROFILES:
        priced(name)


def errors_by_cadence(head: LengthHead, samples: Samples, split: Split) -> None:
    """Print the mean absolute errors over all samples, each prediction counted down until the next one;
    those of `hidden` blend in the earlier ones."""
    evaluation = Evaluation(samples, split.test)
    blended, newest = (each(head, samples, split) for each in (hidden_estimate, newest_estimate))
    print("| predicted | mean absolute error | predictions per answer |\n|---|---|---|")
    known = [each(samples, split, head.horizon) for each in (histogram, median_left)]
    for estimate in (*known, blended):
        print(f"| {estimate.name} | {evaluation.row(estimate)['mae']['value']:.0f} | |")
    cadences: dict[str, Callable[[int], bool]] = {
        "every 20 tokens": lambda tokens: True,
        "every 100": lambda tokens: tokens % 100 == 0,
        "every 200": lambda tokens: tokens % 200 == 0,
        "at 20, 40, 80, 160, ...": lambda tokens: tokens // 20 & tokens // 20 - 1 == 0,
        "at the prompt's end": lambda tokens: tokens == 0,
    }
    for name, due in cadences.items():
        made = np.array([due(tokens) for tokens in evaluation.generated.tolist()])
        last = np.maximum.accumulate(np.where(made, np.arange(len(made)), 0))
        left = np.maximum(newest.remaining[last] - (evaluation.generated - evaluation.generated[last]), 1.0)
        row = evaluation.row(Estimate(name, 0, left))
        print(f"| {name} | {row['mae']['value']:.0f} | {made.sum() / evaluation.requests:.1f} |")


class Server:
    """A server of vLLM and all of its processes."""

    def __init__(self, args: argparse.Namespace, kind: str, options: tuple[str, ...]) -> None:
        args.logs.mkdir(parents=True, exist_ok=True)
        port = free_ports(())
        self.url = f"http://127.0.0.1:{port}"
        words = ["--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port)]
        words += ["--dtype", "bfloat16", "--max-model-len", "8192", "--enforce-eager"]
        words += ["--block-size", str(BLOCK_TOKENS), "--kv-cache-memory-bytes", str(2**30)]
        words += ["--enable-prefix-caching", *options]
        with (args.logs / f"{kind}.log").open("wb") as log:
            self.process = subprocess.Popen(
                [args.vllm_bin, "serve", args.model, *words],
                env={**os.environ, **on_cpu(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def cpu_s(self) -> float:
        """Return the CPU seconds of all processes of its session."""
        ticks = 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                told = path.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(told[3]) == self.process.pid:
                ticks += int(told[11]) + int(told[12])
        return ticks / os.sysconf("SC_CLK_TCK")


@asynccontextmanager
async def serving(
    args: argparse.Namespace, session: aiohttp.ClientSession, kind: str, options: tuple[str, ...] = ()
) -> AsyncIterator[tuple[Server, VllmClient]]:
    """Yield a healthy server, which ends with the block."""
    server = Server(args, kind, options)
    try:
        async with asyncio.timeout(START_S):
            while not await healthy(session, server.url):
                if server.process.poll() is not None:
                    raise SystemExit(f"the server that {kind} ended while it started; see {args.logs}")
                await asyncio.sleep(0.5)
        yield server, VllmClient(session, server.url, deadline_s=300.0)
    finally:
        if server.process.poll() is None:
            os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait()


async def measure(args: argparse.Namespace, head: LengthHead, samples: Samples, split: Split) -> None:
    """Compare states, and print what predictions take beside decode steps."""
    steps: list[float] = []
    rows: list[list[float]] = []
    async with aiohttp.ClientSession() as session:
        async with serving(args, session, "generate") as (server, client):
            await decode_step_s(server, client, 2, 64)
            for point in POINTS:
                steps.append(await decode_step_s(server, client, *point))
        async with serving(args, session, "pool", (*POOLING, json.dumps(POOLER))) as (server, client):
            await compare_states(client, head, samples, split, args.compared)
            for point in POINTS:
                rows.append(await predictions_s(server, client, *point))
    print_costs("CPU of this machine", POINTS, steps, rows)


def texts(requests: int, tokens: int) -> list[list[int]]:
    """Return token ids that no cache has."""
    return [[random.randrange(100, 40_000) for _ in range(tokens)] for _ in range(requests)]


async def decode_step_s(server: Server, client: VllmClient, requests: int, tokens: int) -> float:
    """Return the CPU seconds of a decode step of so many requests, each of so many tokens."""
    prompts = texts(requests, tokens)
    spent: list[float] = []
    for generated in (1, 1, 1 + STEPS):  # the first fills the prefix cache
        start = server.cpu_s()
        body = {"model": "m", "prompt": prompts, "max_tokens": generated, "ignore_eos": True}
        check(await client.ask("/v1/completions", body))
        spent.append(server.cpu_s() - start)
    return (spent[2] - spent[1]) / STEPS


async def predictions_s(server: Server, client: VllmClient, requests: int, tokens: int) -> list[float]:
    """Return the CPU seconds of a state for each of so many texts of so many tokens: all new, and grown since
    the last time by each of EVERY."""
    asked = texts(requests, tokens)
    spent: list[float] = []
    start = server.cpu_s()
    await states(client, asked)
    spent.append(server.cpu_s() - start)
    for every in EVERY:
        start = server.cpu_s()
        for _ in range(GROWN):
            asked = [text + more for text, more in zip(asked, texts(requests, every), strict=True)]
            await states(client, asked)
        spent.append((server.cpu_s() - start) / GROWN)
    return spent


async def states(client: VllmClient, asked: list[list[int]]) -> torch.Tensor:
    """Return the last hidden state of each text."""
    reply = check(
        await client.ask("/v1/embeddings", {"model": "m", "input": asked, "encoding_format": "base64"})
    )
    rows = [np.frombuffer(base64.b64decode(each["embedding"]), np.float32) for each in reply["data"]]
    return torch.from_numpy(np.stack(rows))


async def compare_states(
    client: VllmClient, head: LengthHead, samples: Samples, split: Split, count: int
) -> None:
    """Print how far states and predictions are from those of the collection."""
    held_out = np.flatnonzero(samples.of_requests(split.test))
    rows = np.random.default_rng(0).choice(held_out, count, replace=False)
    begins = samples.first_token[samples.request[rows]]
    ends = begins + samples.prompt_tokens[samples.request[rows]] + samples.generated[rows]
    asked = [samples.tokens[begin:end].tolist() for begin, end in zip(begins, ends, strict=True)]
    pooled, kept = await states(client, asked), torch.from_numpy(samples.hidden[rows]).float()
    generated = torch.from_numpy(samples.generated[rows])
    ours, theirs = (head.remaining(each, generated).numpy() for each in (kept, pooled))
    apart = np.abs(ours - theirs)
    off = [np.abs(each - samples.remaining[rows]).mean() for each in (ours, theirs)]
    print(f"\n{count} states of the embedded engine, and of vLLM:")
    print(f"cosine at least {torch.cosine_similarity(pooled, kept).min():.4f}")
    print(f"predictions apart by {np.median(apart):.2f} tokens in the median, {apart.max():.1f} at most")
    print(f"and off by {off[0]:.1f} and {off[1]:.1f} tokens")


def priced(name: str) -> None:
    """Print what predictions take on GPUs, one forward for all that are due at once."""
    profile = packaged_profile(name).profile
    steps: list[float] = []
    rows: list[list[float]] = []
    for requests, tokens in GPU_POINTS:
        steps.append(float(profile.step.seconds(requests, requests * tokens)))
        # A grown text is computed from the beginning of its last block on.
        grown = [(every + (BLOCK_TOKENS - 1) / 2, float(tokens)) for every in EVERY]
        rows.append(
            [
                float(profile.prefill.seconds(requests * new, requests * attention_work(new, cached)))
                for new, cached in [(float(tokens), 0.0), *grown]
            ]
        )
    print_costs(name, GPU_POINTS, steps, rows)


def print_costs(
    name: str,
    points: tuple[tuple[int, int], ...],
    steps: list[float],
    rows: list[list[float]],
) -> None:
    """Print the seconds of a prediction for all requests of a batch, and which share they are of the steps
    until the next one."""
    print(f"\n{name}:\n| requests x tokens | decode step | {' | '.join(_columns())} |")
    print(f"|---|---|{'---|' * 2 * len(EVERY)}")
    for (requests, tokens), step, (new, *grown) in zip(points, steps, rows, strict=True):
        pairs = [*((new, every) for every in EVERY), *zip(grown, EVERY, strict=True)]
        cells = [f"{took * 1e3:,.0f} ms, {took / every / step:.0%}" for took, every in pairs]
        print(f"| {requests} x {tokens:,} | {step * 1e3:,.1f} ms | {' | '.join(cells)} |")


def _columns() -> list[str]:
    return [f"{kind}, every {every}" for kind in ("all new", "grown") for every in EVERY]


def check(reply: Any) -> Any:
    """Return the body of an answer; SystemExit for an error."""
    if reply.status != 200:
        raise SystemExit(f"status {reply.status}: {reply.error}")
    return reply.body


if __name__ == "__main__":
    main()
