"""A decode that another engine asks for, stage by stage, at every step boundary that matters."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.block_checks import check_blocks
from tests.engine.engine_harness import Driven, prompt_of, request
from tidegate.core.migration import LAST_STAGE_BLOCKS
from tidegate.engines.embedded.departures import PAUSE_S
from tidegate.engines.embedded.stages import NotMovable, StageAnswer, StageQuestion

PROMPT = prompt_of(100)
ROOM = 64
UNDISTURBED: dict[Path, list[int]] = {}


def decoding(model: Path) -> Driven:
    """An engine that has answered a few tokens of ``r``."""
    driven = Driven(model)
    driven.submit(request("r", PROMPT, 60, temperature=0.8, seed=5))
    while len(driven.legs["r"].token_ids) < 8:
        driven.step()
    return driven


def undisturbed(model: Path) -> list[int]:
    if model not in UNDISTURBED:
        (leg,) = Driven(model).run(request("r", PROMPT, 60, temperature=0.8, seed=5))
        UNDISTURBED[model] = leg.token_ids
    return UNDISTURBED[model]


def ask(driven: Driven, after: StageAnswer | None = None, *, stages: int = 0, blocks: int = 0) -> StageAnswer:
    """Ask for what is behind ``blocks`` blocks; ``after`` is the last answer."""
    epoch = None if after is None else after.epoch
    question = StageQuestion("r", len(PROMPT), blocks, ROOM, stages, epoch)
    return driven.engine.departures.answer(driven.engine._live.get("r"), question)


def paused(driven: Driven) -> StageAnswer:
    first = ask(driven)
    assert first.state is None
    last = ask(driven, first, stages=1, blocks=len(first.block_ids))
    assert last.state is not None and last.state["seed"] == 5 and len(last.block_ids) <= LAST_STAGE_BLOCKS
    check_blocks(driven.engine.scheduler)
    return last


def test_the_source_decodes_on_beside_a_stage_and_stands_still_once_it_is_paused(llama: Path) -> None:
    driven = decoding(llama)
    first = ask(driven)
    assert first.token_ids == driven.legs["r"].token_ids
    assert len(first.block_ids) == (len(PROMPT) + 7) // 16, "full blocks only"
    assert driven.step() == 1
    last = ask(driven, first, stages=1, blocks=len(first.block_ids))
    said = driven.legs["r"].token_ids
    assert last.token_ids == said and len(said) == 9
    assert driven.step() == 0
    assert driven.engine.stats().pinned == 1


@pytest.mark.parametrize("how", ["stay", "late"])
def test_a_destination_that_stays_away_leaves_no_trace(llama: Path, how: str) -> None:
    driven = decoding(llama)
    paused(driven)
    if how == "stay":
        driven.engine.stay("r")
    else:
        driven.clock.at_s += PAUSE_S
    driven.drain()
    assert driven.legs["r"].token_ids == undisturbed(llama)
    assert not driven.engine.commit("r"), "too late"
    driven.assert_clean()


def test_a_commit_ends_the_leg_at_once_and_frees_it_at_the_next_step(llama: Path) -> None:
    driven = decoding(llama)
    told: list[str | None] = []
    driven.engine._sink = lambda outputs: told.extend(output.finish_reason for output in outputs)
    paused(driven)
    assert driven.engine.commit("r")
    assert told == ["migrated"]
    driven.engine.stay("r")
    driven.engine.abort("r")
    driven.drain()
    assert told == ["migrated"] and len(driven.legs["r"].token_ids) == 8
    driven.assert_clean()


def test_an_abort_while_it_is_paused_frees_it_and_refuses_the_commit(llama: Path) -> None:
    driven = decoding(llama)
    paused(driven)
    driven.engine.release("r")
    driven.engine.abort("r")
    driven.drain()
    assert driven.legs["r"].reason == "abort"
    assert not driven.engine.commit("r")
    driven.assert_clean()


def test_what_was_copied_before_a_preemption_is_void(llama: Path) -> None:
    driven = decoding(llama)
    first = ask(driven)
    scheduler = driven.engine.scheduler
    scheduler._preempt(scheduler.running.pop())
    with pytest.raises(NotMovable, match="does not decode"):
        ask(driven, first, stages=1, blocks=3)
    driven.step()
    with pytest.raises(NotMovable, match="preempted"):
        ask(driven, first, stages=1, blocks=3)
    driven.drain()
    assert driven.legs["r"].token_ids == undisturbed(llama)


def test_a_decode_that_outgrew_what_was_reserved_goes_on(llama: Path) -> None:
    driven = decoding(llama)
    with pytest.raises(NotMovable, match="outgrown"):
        driven.engine.departures.answer(
            driven.engine._live["r"], StageQuestion("r", len(PROMPT), 5, 6, stages=3)
        )
    driven.drain()
    assert driven.legs["r"].token_ids == undisturbed(llama)
    driven.assert_clean()
