"""An instance measures itself at start: seconds of prefills and decode steps through the real loop body."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from tidegate.core.errors import SetupError
from tidegate.engines.embedded.engine import EmbeddedEngine
from tidegate.engines.serving.types import GenerateRequest, SamplingParams

_PREFILLS = (
    *((16, 0), (64, 0), (256, 0), (1024, 0), (64, 512), (256, 512), (64, 2048)),
    *((128, 0), (512, 0), (2048, 0)),
)
"""New and cached tokens of each, what is needed most first."""
_BATCHES = (1, 16, 4, 64, 8, 32)
_CONTEXTS = (64, 512, 2048)
_STEPS = 3
_POOL_SHARE = 0.5
"""Share of the pool that a decode measurement may fill, so that it leaves most memory untouched."""


def self_profile(engine: EmbeddedEngine, budget_s: float = 1.0) -> list[dict[str, Any]]:
    """Measure ``engine``, whose loop must not have been started, for about ``budget_s`` seconds.

    Returns raw samples, at least one of each kind if the pool allows: ``{"kind": "prefill", "new_tokens",
    "cached_tokens", "seconds"}`` for one prompt from submit to first token, and ``{"kind": "step", "batch",
    "context_tokens", "seconds"}`` for one decode step of ``batch`` requests. The pool, the prefix cache and
    the counters are afterwards as before. Raises SetupError when a step fails.
    """
    before = replace(engine.scheduler.counters)
    rng = random.Random(0)
    _prefill(engine, rng, 16, 0)
    samples: list[dict[str, Any]] = []
    start = time.perf_counter()
    for new, cached in _PREFILLS:
        if new + cached >= engine.max_model_len:
            continue
        if samples and time.perf_counter() - start > budget_s / 2:
            break
        samples.append(_prefill(engine, rng, new, cached))
    start = time.perf_counter()
    for batch, context in _step_points(engine):
        measured = any(sample["kind"] == "step" for sample in samples)
        if measured and time.perf_counter() - start > budget_s / 2:
            break
        samples.extend(_steps(engine, rng, batch, context))
    engine.scheduler.pool.forget()
    engine.scheduler.counters = before
    engine.step()  # its statistics show the counters
    return samples


def _step_points(engine: EmbeddedEngine) -> Iterator[tuple[int, int]]:
    stats = engine.stats()
    room = int(stats.total_blocks * stats.block_tokens * _POOL_SHARE)
    most = engine.config.max_num_seqs
    for context, batch in product(_CONTEXTS, _BATCHES):
        fits = context + _STEPS + 2 <= engine.max_model_len
        if fits and batch <= most and batch * (context + engine.config.block_tokens) <= room:
            yield batch, context


def _prefill(engine: EmbeddedEngine, rng: random.Random, new: int, cached: int) -> dict[str, Any]:
    prefix = _prompt(engine, rng, cached)
    if cached:
        engine.submit(_request("profile-prefix", prefix, 1))
        _drain(engine)
    engine.submit(_request("profile", prefix + _prompt(engine, rng, new), 1))
    start = time.perf_counter()
    _drain(engine)
    seconds = time.perf_counter() - start
    return {"kind": "prefill", "new_tokens": new, "cached_tokens": cached, "seconds": seconds}


def _steps(engine: EmbeddedEngine, rng: random.Random, batch: int, context: int) -> Iterator[dict[str, Any]]:
    """Time decode steps over KV that is allocated but never computed: its values do not change the time."""
    for index in range(batch):
        request = _request(f"profile-{index}", _prompt(engine, rng, context), _STEPS + 1)
        engine.place_computed(request)
    _step(engine)
    for step in range(_STEPS):
        start = time.perf_counter()
        _step(engine)
        seconds = time.perf_counter() - start
        yield {"kind": "step", "batch": batch, "context_tokens": context + 1 + step, "seconds": seconds}
    _drain(engine)
    # The prefix cache would otherwise vouch for KV that nobody computed.
    engine.scheduler.pool.forget()


def _drain(engine: EmbeddedEngine) -> None:
    while _step(engine):
        pass


def _step(engine: EmbeddedEngine) -> int:
    """Take one step and return its tokens. A failed step only shows in the outputs it ends."""
    step = engine.step()
    for output in step.outputs:
        if output.finish_reason == "error":
            raise SetupError(f"the engine cannot compute its model: {output.error}")
    return step.tokens


def _prompt(engine: EmbeddedEngine, rng: random.Random, tokens: int) -> tuple[int, ...]:
    return tuple(rng.randrange(engine.model.vocab_size) for _ in range(tokens))


def _request(request_id: str, prompt: tuple[int, ...], max_tokens: int) -> GenerateRequest:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return GenerateRequest(request_id, prompt, params, salt="profile")
