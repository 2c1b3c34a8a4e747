"""What steps take: a share of a core, and predictions that follow what steps took."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.engine.engine_harness import Driven, HandClock, prompt_of, request
from tidegate.costs.forms import MixedCost, StepCost, attention_work
from tidegate.costs.named_profile import load_profile
from tidegate.costs.profile import UNMEASURED
from tidegate.engines.embedded.model import Batch
from tidegate.engines.embedded.step_time import Pace, StepTimes
from tidegate.policies.order import Ticket

ONE_PER_TOKEN = replace(UNMEASURED, step=StepCost(0.0, 1.0, 0.0), mixed=MixedCost(0.0, 1.0, 0.0, 0.0))


def decode_and_chunk() -> Batch:
    """Return a step of a decode that holds 100 tokens, and a chunk of 10."""
    single: Any = SimpleNamespace(computed=100)
    chunk: Any = SimpleNamespace(count=10, sequence=SimpleNamespace(computed=10))
    return Batch([single], [chunk])


def test_steps_take_as_long_as_the_pace_says(monkeypatch: pytest.MonkeyPatch) -> None:
    slept_s: list[float] = []
    monkeypatch.setattr(time, "sleep", slept_s.append)
    clock = HandClock()
    for batch in (decode_and_chunk(), Batch(decode_and_chunk().singles, [])):
        Pace(ONE_PER_TOKEN, clock).keep(batch, began_s=998.0)
        Pace(ONE_PER_TOKEN, clock).keep(batch, began_s=900.0)
        Pace(None, clock).keep(batch, began_s=998.0)
    assert slept_s == [9.0, 0.0, 0.0, 0.0], "eleven tokens, and one of which began two seconds ago"


def test_an_engine_keeps_its_pace(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept_s: list[float] = []
    monkeypatch.setattr(time, "sleep", slept_s.append)
    driven = Driven(llama, pace="l40s/llama-3.1-8b")
    driven.run(request("r", prompt_of(20), 2))
    paced = load_profile("l40s/llama-3.1-8b").profile
    said_s = paced.mixed.seconds(20, attention_work(20, 0), 0), paced.step.seconds(1, 21)
    assert slept_s == pytest.approx([float(seconds) for seconds in said_s])


@pytest.mark.parametrize(("slower", "chunk"), [(1.0, 18), (2.0, 8), (0.5, 38)])
def test_chunks_follow_what_steps_took(
    llama: Path, monkeypatch: pytest.MonkeyPatch, slower: float, chunk: int
) -> None:
    """Steps take ``slower`` times a second per token. A decode has 20 s left, of which 2 % are for the cost's
    error and one token is its own."""
    driven = Driven(llama, chunks="slack")
    driven.engine.scheduler.price(ONE_PER_TOKEN)
    runner, sizes = driven.engine._runner, list[int]()

    def timed(batch: Batch) -> Any:
        driven.clock.at_s += slower * batch.tokens
        sizes.append(batch.tokens)
        return run(batch)

    run = runner.run
    monkeypatch.setattr(runner, "run", timed)
    for index in range(16):  # each takes a step with a chunk and one without
        driven.run(request(f"r{index}", prompt_of(20), 2))
    now_s = driven.clock.at_s
    decode = request("decode", prompt_of(4), 400)
    driven.submit(replace(decode, ticket=Ticket(now_s, now_s + 1e6, 0.0, tpot_s=20.0)))
    driven.step()
    driven.submit(request("prompt", prompt_of(200, seed=1), 2))
    sizes.clear()
    driven.step()
    assert sizes == [1 + chunk]


def test_a_step_that_takes_twice_as_long_is_predicted_so_whatever_its_decodes_hold() -> None:
    costs = replace(UNMEASURED, step=StepCost(1.0, 0.0, 0.0), mixed=MixedCost(1.0, 0.0, 0.0, 0.01))
    times = StepTimes(costs)
    batch = decode_and_chunk()
    for _ in range(16):
        times.observe(batch, 4.0)  # measured: 1 s, and 1 s for what is held
        times.observe(Batch(batch.singles, []), 1.0)
    assert times.profile.mixed.seconds(11, 50.0, 100) == pytest.approx(4.0)
    assert times.profile.step.seconds(1, 100) == pytest.approx(1.0)


def test_no_prompt_joins_a_step_by_which_one_in_it_misses(llama: Path) -> None:
    """The first takes 22 s of its 30, of which 2 % are for the cost's error: that leaves 7 tokens."""
    driven = Driven(llama, chunks="slack", order="feasible-sjf")
    driven.engine.scheduler.price(replace(UNMEASURED, mixed=MixedCost(2.0, 1.0, 0.0, 0.0)))
    for name, tokens, due_s in (("first", 20, 30.0), ("second", 40, 1e3)):
        waits = request(name, prompt_of(tokens, seed=tokens), 2)
        driven.submit(replace(waits, ticket=Ticket(0.0, due_s, float(tokens))))
    assert driven.step() == 27
