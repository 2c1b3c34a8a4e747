"""The embedded engine beside transformers' own ``generate``: one model, a static batch, the same cores.

The two take turns in one process, and the fastest turn of each counts, in seconds of CPU and of the clock.
Prompts are of one length, so that ``generate`` pads nothing; the engine serves any mixture at this speed.
Tokens are compared, too: both are greedy, and below float64 may part where two tokens are nearly tied.

    python benchmarks/embedded_speed.py           # SmolLM2-135M-Instruct, from the cache or fetched
    python benchmarks/embedded_speed.py --model DIR --dtype float32 --batch 8 --prompt 128 --tokens 32
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tidegate.cli.model import named_model
from tidegate.engines.embedded.engine import EmbeddedEngine
from tidegate.engines.embedded.options import EngineConfig
from tidegate.engines.serving.types import GenerateRequest, SamplingParams

TEXT = (
    "The harbour of the town lies behind a bar of sand, which ships cross two hours before high water. A "
    "pilot knows the day's depth from the tables, the wind of the night from the wall, and the rest from "
    "forty years. When the tide turns he signs the book, hangs the lantern in its place and walks home along "
    "the quay, past the customs house, the rope works and the school, where his daughter teaches children to "
    "count boats. "
)
"""What prompts are cut from, each beginning at another word."""

Turn = Callable[[int], list[list[int]]]


@dataclass
class Best:
    """The least that some work took: seconds of CPU and of the clock."""

    cpu_s: float = float("inf")
    wall_s: float = float("inf")

    def run(self, turn: Turn, tokens: int) -> list[list[int]]:
        """Take one turn of ``tokens`` output tokens and keep what it took, if that is less."""
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        said = turn(tokens)
        self.cpu_s = min(self.cpu_s, time.process_time() - cpu_s)
        self.wall_s = min(self.wall_s, time.perf_counter() - wall_s)
        return said


def engine_turns(engine: EmbeddedEngine, prompts: list[list[int]]) -> Turn:
    """Return what has the embedded engine answer all prompts."""

    def turn(tokens: int) -> list[list[int]]:
        engine.scheduler.pool.forget()
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        said: dict[str, list[int]] = {str(row): [] for row in range(len(prompts))}
        for row, prompt in enumerate(prompts):
            engine.submit(GenerateRequest(str(row), tuple(prompt), params))
        while (step := engine.step()).tokens:
            for output in step.outputs:
                said[output.request_id] += output.token_ids
        return list(said.values())

    return turn


def generate_turns(folder: Path, dtype: torch.dtype, prompts: list[list[int]]) -> Turn:
    """Return what has ``generate`` answer all prompts."""
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=dtype).eval()
    ids = torch.tensor(prompts)

    @torch.inference_mode()
    def turn(tokens: int) -> list[list[int]]:
        answer = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        said: list[list[int]] = answer[:, ids.shape[1] :].tolist()
        return said

    return turn


def row(what: str, unit: str, scale: float, ours: Best, theirs: Best) -> str:
    """Return one line: both sides by the CPU and by the clock, and their ratios."""
    return (
        f"{what:8} {unit:10} {scale * ours.cpu_s:9.2f} {scale * theirs.cpu_s:9.2f}   "
        f"x{ours.cpu_s / theirs.cpu_s:.2f}      {scale * ours.wall_s:9.2f} {scale * theirs.wall_s:9.2f}   "
        f"x{ours.wall_s / theirs.wall_s:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each answer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    args.model = args.model or named_model("smollm2")
    config = EngineConfig(
        args.model, dtype=args.dtype, threads=args.threads, kv_memory_mb=1024, max_batch_tokens=2048
    )
    engine = EmbeddedEngine(config)
    words = TEXT.split(" ")
    texts = [" ".join([*words[7 * n :], *words] * 20) for n in range(args.batch)]
    prompts = [engine.tokenizer.encode(text)[: args.prompt] for text in texts]
    ours = engine_turns(engine, prompts)
    theirs = generate_turns(args.model, engine.model.kv.dtype, prompts)
    sides = [(ours, Best(), Best()), (theirs, Best(), Best())]
    said: list[list[list[int]]] = [[], []]
    for turn, *_ in sides:
        turn(2)
    for _ in range(args.rounds):
        for side, (turn, first, whole) in enumerate(sides):
            first.run(turn, 1)
            said[side] = whole.run(turn, args.tokens)
    decodes = [Best(whole.cpu_s - first.cpu_s, whole.wall_s - first.wall_s) for _, first, whole in sides]
    same = sum(ours == theirs for ours, theirs in zip(*said, strict=True))
    print(f"{args.model.name}, {engine.model.kv.dtype}, batch {args.batch}, prompts of {args.prompt} tokens, "
          f"{args.threads} threads: best of {args.rounds}")  # fmt: skip
    print(f"{'':19} {'CPU: engine':>9} {'generate':>8}   ratio   clock: engine  generate   ratio")
    print(row("prefill", "ms/token", 1e3 / (args.batch * args.prompt), sides[0][1], sides[1][1]))
    print(row("decode", "ms/step", 1e3 / (args.tokens - 1), decodes[0], decodes[1]))
    print(f"the same {args.tokens} tokens in {same} of {args.batch} answers")


if __name__ == "__main__":
    main()
