"""Sampling follows the distribution, its filters and nothing but (seed, position)."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.engine_harness import Driven, HandPuller, prompt_of, request, source_of
from tidegate.engines.embedded.sampling import Draw, sample, uniform
from tidegate.engines.serving.types import SamplingParams

LOGITS = torch.tensor([1.0, 3.0, 2.0, 0.0, -1.0])


def draw(position: int = 0, *, seed: int = 1, banned: tuple[int, ...] = (), **params: Any) -> Draw:
    return Draw(SamplingParams(**params), position, seed, banned)


def tokens(draws: list[Draw], logits: torch.Tensor = LOGITS) -> list[int]:
    return [choice.token_id for choice in sample(logits.expand(len(draws), -1), draws)]


def test_greedy_takes_the_best_that_is_allowed() -> None:
    assert tokens([draw(temperature=0), draw(temperature=0, banned=(1, 2))]) == [1, 0]


def test_frequencies_follow_the_softmax() -> None:
    count = 20_000
    seen = Counter(tokens([draw(position) for position in range(count)]))
    expected = torch.softmax(LOGITS.double(), 0)
    for token, share in enumerate(expected.tolist()):
        assert abs(seen[token] / count - share) < 4 * math.sqrt(share / count)


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 2}, {1, 2}),
        ({"top_p": 0.6}, {1}),
        ({"top_p": 0.7}, {1, 2}),
        ({"top_p": 0.0}, {1}),
        ({"top_k": 2, "top_p": 0.72}, {1}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"temperature": 0.01}, {1}),
    ],
)
def test_filters(params: dict[str, Any], allowed: set[int]) -> None:
    assert set(tokens([draw(position, **params) for position in range(2000)])) == allowed


def test_top_p_keeps_the_lowest_ids_of_equals_up_to_the_mass() -> None:
    draws = [draw(position, top_p=0.5) for position in range(500)]
    assert set(tokens(draws, torch.zeros(4))) == {0, 1}


@given(st.integers(-(2**70), 2**70), st.integers(0, 10**6))
def test_uniforms_are_in_range_and_reproducible(seed: int, position: int) -> None:
    assert 0.0 <= uniform(seed, position) < 1.0
    assert uniform(seed, position) == uniform(seed, position)


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=40), st.integers(0, 50))
def test_noise_below_the_gaps_changes_nothing(values: list[float], position: int) -> None:
    logits = torch.tensor([values], dtype=torch.float64)
    noisy = logits + 1e-13
    one = [draw(position, temperature=0.7)]
    probs = torch.softmax(logits / 0.7, -1).cumsum(-1)
    if (probs - uniform(1, position)).abs().min() > 1e-9:
        assert sample(logits, one) == sample(noisy, one)


def test_logprobs_are_of_the_unfiltered_model() -> None:
    choices = sample(
        LOGITS.expand(3, -1),
        [
            draw(temperature=0, logprobs=2),
            draw(temperature=5.0, top_k=1, logprobs=0),
            draw(temperature=0, banned=(1,)),
        ],
    )
    table = torch.log_softmax(LOGITS.double(), 0).tolist()
    assert choices[0].logprob == pytest.approx(table[1])
    best, second = choices[0].alternatives
    assert (best[0], second[0]) == (1, 2)
    assert (best[1], second[1]) == (pytest.approx(table[1]), pytest.approx(table[2]))
    assert choices[1].logprob == pytest.approx(table[1])
    assert choices[1].alternatives == ()
    assert choices[2].logprob is None


def test_a_seeded_request_continues_elsewhere_as_if_unbroken(llama: Path) -> None:
    there, here = Driven(llama, engine_id="there"), Driven(llama, engine_id="here")
    puller = HandPuller(here.engine, {"there": there.engine})
    here.engine.scheduler.puller = puller
    params: dict[str, Any] = {"temperature": 1.0, "seed": 42, "top_p": 0.95, "top_k": 100, "min_tokens": 20}
    prompt = prompt_of(40)
    whole = there.run(request("whole", prompt, 30, ignore_eos=False, **params))[0]
    there.engine.scheduler.pool.forget()
    head = there.run(request("head", prompt, 11, pin_kv=True, ignore_eos=False, **params))[0]
    tail = request(
        "tail",
        prompt + head.token_ids,
        19,
        generated=11,
        source=source_of(there, "head"),
        ignore_eos=False,
        **params,
    )
    here.submit(tail)
    here.drain()
    puller.deliver()
    here.drain()
    assert head.token_ids + here.legs["tail"].token_ids == whole.token_ids
    other = there.run(request("other", prompt, 30, **{**params, "seed": 43}))[0]
    assert other.token_ids != whole.token_ids
    fresh = [there.run(request(f"f{n}", prompt, 12, temperature=1.0))[0].token_ids for n in range(2)]
    assert fresh[0] != fresh[1]


def test_logprobs_reach_the_output(llama: Path) -> None:
    driven = Driven(llama)
    driven.submit(request("a", prompt_of(10), 1, logprobs=3))
    (output,) = driven.engine.step().outputs
    assert output.logprobs is not None
    (entry,) = output.logprobs
    assert entry.token_id == output.token_ids[0] == entry.top[0].token_id
    assert entry.logprob == entry.top[0].logprob
    assert (entry.text, entry.spelt) == (entry.top[0].text, entry.top[0].spelt)
    assert len(entry.top) == 3


def test_min_tokens_hold_off_eos_over_legs(llama: Path) -> None:
    driven = Driven(llama)
    prompt = prompt_of(30)
    first = driven.run(request("probe", prompt, 6))[0].token_ids
    stop = (first[2],)
    assert driven.run(request("short", prompt, 6, stop_token_ids=stop))[0].token_ids == first[:3]
    held = driven.run(request("held", prompt, 6, stop_token_ids=stop, min_tokens=5))[0]
    assert stop[0] not in held.token_ids[:5]
    leg = request("leg", prompt + first[:2], 4, generated=2, stop_token_ids=stop, min_tokens=2)
    assert driven.run(leg)[0].token_ids == first[2:3]
