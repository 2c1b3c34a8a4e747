"""In float64 greedy output is a function of the prompt alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.engine_harness import Driven, HandPuller, Leg, prompt_of, request, source_of

PROMPT = prompt_of(75, seed=1)
NEW = 40


@pytest.fixture(scope="module")
def alone(llama: Path) -> Leg:
    return Driven(llama).run(request("alone", PROMPT, NEW))[0]


def others(count: int) -> list:  # type: ignore[type-arg]
    return [request(f"other-{n}", prompt_of(5 + 17 * n, seed=100 + n), 5 + 3 * n) for n in range(count)]


def test_in_a_batch(llama: Path, alone: Leg) -> None:
    driven = Driven(llama, total_blocks=512)
    legs = driven.run(*others(12), request("mine", PROMPT, NEW))
    assert legs[-1].token_ids == alone.token_ids
    assert legs[-1].text == alone.text


@pytest.mark.parametrize("budget", [8, 19, 64])
def test_chunked(llama: Path, alone: Leg, budget: int) -> None:
    driven = Driven(llama, max_batch_tokens=budget, max_num_seqs=8)
    assert driven.run(*others(3), request("mine", PROMPT, NEW))[-1].token_ids == alone.token_ids


@pytest.mark.parametrize("block_tokens", [1, 7, 64])
def test_with_other_block_sizes(llama: Path, alone: Leg, block_tokens: int) -> None:
    driven = Driven(llama, block_tokens=block_tokens, total_blocks=4096 // block_tokens)
    legs = driven.run(request("mine", PROMPT, NEW), *others(3))
    assert legs[0].token_ids == alone.token_ids


def test_from_the_prefix_cache(llama: Path, alone: Leg) -> None:
    driven = Driven(llama)
    driven.run(request("first", PROMPT, NEW))
    again = driven.run(request("again", PROMPT + alone.token_ids[:20], NEW - 20, generated=20))[0]
    assert again.token_ids == alone.token_ids[20:]
    assert again.last and again.last.times and again.last.times.cached_tokens == 80


def test_after_preemption(llama: Path, alone: Leg) -> None:
    driven = Driven(llama, total_blocks=14)
    older = request("older", prompt_of(60, seed=7), 70)
    legs = driven.run(older, request("mine", PROMPT, NEW))
    assert legs[1].token_ids == alone.token_ids
    assert legs[1].last and legs[1].last.times and legs[1].last.times.preemptions > 0
    driven.assert_clean()


@pytest.mark.parametrize("first", [1, 5, 6, 22, 39])
def test_in_two_legs_on_two_engines(llama: Path, alone: Leg, first: int) -> None:
    there, here = Driven(llama, engine_id="there"), Driven(llama, engine_id="here")
    puller = HandPuller(here.engine, {"there": there.engine})
    here.engine.scheduler.puller = puller
    head = there.run(request("leg-1", PROMPT, first, pin_kv=True))[0]

    here.submit(
        request(
            "leg-2",
            PROMPT + head.token_ids,
            NEW - first,
            generated=first,
            source=source_of(there, "leg-1"),
        )
    )
    here.drain()
    assert here.engine.stats().loading == 1
    assert puller.deliver() == 1
    here.drain()
    there.drain()

    tail = here.legs["leg-2"]
    assert head.token_ids + tail.token_ids == alone.token_ids
    assert head.text + tail.text == alone.text
    assert tail.last and tail.last.times
    assert tail.last.times.kv_loaded_tokens == len(PROMPT) + first - 1
    stats = here.engine.stats()
    assert stats.pulled_prompt_tokens == len(PROMPT) + first - 1
    assert stats.computed_prompt_tokens == 1
    assert stats.pulled_bytes > 0
    here.assert_clean()
    there.assert_clean()


@pytest.mark.parametrize("error", [None, "the line is cut"])
def test_a_round_pulls_and_computes_only_what_is_not_here(llama: Path, error: str | None) -> None:
    there, here = Driven(llama, engine_id="there"), Driven(llama, engine_id="here")
    puller = HandPuller(here.engine, {"there": there.engine})
    here.engine.scheduler.puller = puller
    block = here.engine.store.block_tokens
    said = there.run(request("round-1", PROMPT, 3 * block, pin_kv=True))[0].token_ids
    here.run(request("begun", PROMPT[: 2 * block + 1], 1))
    whole = [*PROMPT, *said, *PROMPT[:7]]
    alone = Driven(llama).run(request("alone", whole, 8))[0]

    here.submit(request("round-2", whole, 8, source=source_of(there, "round-1")))
    here.drain()
    assert puller.deliver(error) == 1
    here.drain()
    there.engine.release("round-1")
    there.drain()

    leg, held = here.legs["round-2"], len(PROMPT) + len(said) - 1
    assert leg.token_ids == alone.token_ids
    times, stats = None if leg.last is None else leg.last.times, here.engine.stats()
    assert times is not None and times.cached_tokens == 2 * block
    if error is None:
        assert times.kv_loaded_tokens == held - 2 * block
        assert stats.pulled_bytes == (-(-held // block) - 2) * here.engine.store.block_bytes
        assert stats.computed_prompt_tokens == 2 * block + 1 + len(whole) - held
    here.assert_clean()
    there.assert_clean()


def test_in_many_legs_back_and_forth(llama: Path, alone: Leg) -> None:
    pair = {name: Driven(llama, engine_id=name) for name in ("a", "b")}
    pullers = {
        name: HandPuller(one.engine, {other: pair[other].engine for other in pair})
        for name, one in pair.items()
    }
    for name, one in pair.items():
        one.engine.scheduler.puller = pullers[name]
    ids: list[int] = []
    text = ""
    source = None
    for hop in range(8):
        name = "ab"[hop % 2]
        leg = request(f"hop-{hop}", PROMPT + ids, 5, generated=len(ids), pin_kv=hop < 7, source=source)
        pair[name].submit(leg)
        for _ in range(3):
            pair[name].drain()
            pullers[name].deliver()
        ids += pair[name].legs[leg.id].token_ids
        text += pair[name].legs[leg.id].text
        source = source_of(pair[name], leg.id) if hop < 7 else None
    assert ids == alone.token_ids
    assert text == alone.text
    for one in pair.values():
        one.drain()
        one.assert_clean()


@pytest.mark.parametrize("first", [5, 6, 7])
def test_continued_on_the_same_engine_by_adopting_its_pin(llama: Path, alone: Leg, first: int) -> None:
    driven = Driven(llama)
    head = driven.run(request("leg-1", PROMPT, first, pin_kv=True))[0]
    leg = request(
        "leg-2",
        PROMPT + head.token_ids,
        NEW - first,
        generated=first,
        source=source_of(driven, "leg-1"),
    )
    tail = driven.run(leg)[0]
    assert head.token_ids + tail.token_ids == alone.token_ids
    stats = driven.engine.stats()
    assert stats.computed_prompt_tokens == len(PROMPT) + 1
    assert stats.pulled_bytes == 0
    driven.assert_clean()
