"""What predicting lengths inside the embedded engine's step costs, as a share of the step's CPU time.

    python benchmarks/length_head.py --model models/smollm2 --batch 16

Runs decodes of one batch in this process and times the parts of the step that there are only with a head:
reading states with it, and summing predictions up for the load report. Without ``--predictor`` the head is
the packaged one, or for a model without one a random head of the same shape.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tidegate.engines.embedded.engine import EmbeddedEngine
from tidegate.engines.embedded.length_head import LengthHead
from tidegate.engines.embedded.length_predictor import LengthPredictor
from tidegate.engines.embedded.options import EngineConfig
from tidegate.engines.serving.types import GenerateRequest, SamplingParams
from tidegate.predictor.settings import TrainingSettings

EVERY = 20
PROMPT_TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--predictor", default="auto", metavar="FILE")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args()
    engine = EmbeddedEngine(
        EngineConfig(given.model, dtype=given.dtype, kv_memory_mb=512, predictor=given.predictor)
    )
    if engine.hidden_reader is None:
        engine.hidden_reader = engine._predictor = random_predictor(engine)
    spent: list[float] = []
    engine._read_hidden = timed(engine._read_hidden, spent)  # type: ignore[method-assign]
    engine._predicted = timed(engine._predicted, spent)  # type: ignore[method-assign]

    most = given.steps + EVERY + given.batch
    for index in range(given.batch):
        prompt = tuple(range(5 + index, 5 + index + PROMPT_TOKENS))
        params = SamplingParams(max_tokens=most, temperature=0.8, seed=index, ignore_eos=True)
        engine.submit(GenerateRequest(str(index), prompt, params))
        engine.step()  # one after the other: predictions are not all due in the same step
    for _ in range(EVERY):
        engine.step()
    spent.clear()
    start = time.process_time()
    for _ in range(given.steps):
        assert engine.step().tokens == given.batch
    total = time.process_time() - start
    print(
        f"batch {given.batch}: {total / given.steps * 1e3:.1f} ms of CPU per step, of which "
        f"{sum(spent) / given.steps * 1e3:.3f} ms for lengths, {sum(spent) / total:.2%}"
    )


def random_predictor(engine: EmbeddedEngine) -> LengthPredictor:
    width: Any = engine.model.module.get_output_embeddings()  # type: ignore[operator]
    head = LengthHead((width.in_features, *TrainingSettings().widths, 1), horizon=1024)
    return LengthPredictor(head.eval(), EVERY, engine.max_model_len, torch.device("cpu"))


def timed(call: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    """Return ``call`` adding the CPU seconds of each of its calls to ``spent``."""

    def run(*words: Any) -> Any:
        start = time.process_time()
        try:
            return call(*words)
        finally:
            spent.append(time.process_time() - start)

    return run


if __name__ == "__main__":
    main()
