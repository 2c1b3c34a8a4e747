"""An instance measures itself at start: seconds of prefills and decode steps through the real loop body."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median
from typing import Any

from tidegate.core.errors import SetupError
from tidegate.engines.embedded.engine import EmbeddedEngine
from tidegate.engines.serving.types import GenerateRequest, SamplingParams

MOST_S = 15.0
"""How long the measurement lasts at most where a step takes long; beyond it goes only the first prefill."""
_PREFILL, _STEP = "prefill", "step"
_POINTS = (
    *((_PREFILL, 16, 0), (_STEP, 1, 64), (_PREFILL, 64, 0)),
    *((_STEP, 32, 64), (_PREFILL, 32, 1024), (_STEP, 4, 512)),
    *((_PREFILL, 256, 0), (_STEP, 16, 64), (_PREFILL, 128, 512), (_STEP, 1, 2048)),
    *((_PREFILL, 32, 64), (_STEP, 8, 64), (_PREFILL, 1024, 0), (_STEP, 32, 512)),
    *((_PREFILL, 64, 2048), (_STEP, 64, 64), (_PREFILL, 512, 0), (_STEP, 16, 2048), (_PREFILL, 2048, 0)),
)
"""New and cached tokens of prefills, batch and context of decode steps; what is needed most comes first."""
_ENOUGH = 3
"""Points of a kind that determine its coefficients."""
_STEPS = 3
_POOL_SHARE = 0.5
"""Share of the pool that a measurement may fill, so that it leaves most memory untouched."""


def self_profile(
    engine: EmbeddedEngine,
    budget_s: float = 1.0,
    most_s: float = MOST_S,
    tell: Callable[[str], None] = lambda stage: None,
) -> list[dict[str, Any]]:
    """Measure ``engine``, whose loop must not have been started, for about ``budget_s`` seconds.

    While a kind has too few points for its coefficients it goes on, until ``most_s`` would be exceeded; one
    prefill is measured in any case. Returns raw samples: ``{"kind": "prefill", "new_tokens",
    "cached_tokens", "seconds"}`` for one prompt from submit to first token, and ``{"kind": "step", "batch",
    "context_tokens", "seconds"}`` for one decode step of ``batch`` requests that hold ``context_tokens`` in
    all. KV that they find is allocated but never computed: its values do not change the time. ``tell`` hears
    how far it is. The pool, the prefix cache and the counters are afterwards as before. Raises SetupError
    when a step fails.
    """
    before = replace(engine.scheduler.counters)
    rng = random.Random(0)
    start = time.perf_counter()
    tell("measuring its first prefill")
    first = _prefill(engine, rng, 16, 0)
    samples: list[dict[str, Any]] = []
    if time.perf_counter() - start > most_s / 4:
        samples.append(first)  # Too slow to do it again only because a first time takes longer.
    for kind, size, context in _points(engine):
        spent_s = time.perf_counter() - start
        enough = sum(sample["kind"] == kind for sample in samples) >= _ENOUGH
        turns = _STEPS + 1 if kind == _STEP else 1
        expected_s = turns * first["seconds"] * max(1.0, size / first["new_tokens"])
        if samples and (spent_s > budget_s if enough else spent_s + expected_s > most_s):
            continue
        tell(f"measuring, {len(samples)} points in {spent_s:.0f} s")
        samples.append((_steps if kind == _STEP else _prefill)(engine, rng, size, context))
        first = samples[0]
    engine.scheduler.pool.forget()
    engine.scheduler.counters = before
    engine.step()  # its statistics show the counters
    return samples


def _points(engine: EmbeddedEngine) -> Iterator[tuple[str, int, int]]:
    """Yield the points that the engine has room for."""
    stats = engine.stats()
    room = int(stats.total_blocks * stats.block_tokens * _POOL_SHARE)
    block = engine.config.block_tokens
    for kind, size, context in _POINTS:
        each = context + _STEPS + 2 if kind == _STEP else size + context + 1
        copies = size if kind == _STEP else 1
        fits = each <= engine.max_model_len and copies * (each + block) <= room
        if fits and copies <= engine.config.max_num_seqs:
            yield kind, size, context


def _prefill(engine: EmbeddedEngine, rng: random.Random, new: int, cached: int) -> dict[str, Any]:
    engine.place_computed(_request("profile", _prompt(engine, rng, cached + new), 1), cached)
    start = time.perf_counter()
    _drain(engine)
    seconds = time.perf_counter() - start
    engine.scheduler.pool.forget()
    return {"kind": _PREFILL, "new_tokens": new, "cached_tokens": cached, "seconds": seconds}


def _steps(engine: EmbeddedEngine, rng: random.Random, batch: int, context: int) -> dict[str, Any]:
    for index in range(batch):
        request = _request(f"profile-{index}", _prompt(engine, rng, context), _STEPS + 1)
        engine.place_computed(request, context - 1)
    _step(engine)
    times = []
    for _ in range(_STEPS):
        start = time.perf_counter()
        _step(engine)
        times.append(time.perf_counter() - start)
    _drain(engine)
    # The prefix cache would otherwise vouch for KV that nobody computed.
    engine.scheduler.pool.forget()
    held = batch * (context + 1 + _STEPS // 2)
    return {"kind": _STEP, "batch": batch, "context_tokens": held, "seconds": median(times)}


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
