"""Legs on a clock set by hand: times are the profile's, tokens are the prompt's, and no block is lost."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.costs.library import packaged_profile
from tidegate.dataplane.replica import EngineSettings, parse_groups, replicas_in
from tidegate.engines.emulated.host import Host
from tidegate.engines.emulated.vocabulary import answer
from tidegate.engines.serving.types import GenerateRequest, KvSource, Output, PinnedKv, SamplingParams
from tidegate.policies.chunks import make_chunks
from tidegate.policies.order import Ticket
from tidegate_testing import VirtualClock

NAME = "h100_sxm/llama-3.1-8b"
PACKAGED = packaged_profile(NAME)
LEASE_S = 30.0


class Emulated:
    """Two instances whose outputs are kept."""

    def __init__(self, kv_tokens: int | None = None, chunks: str = "fixed") -> None:
        replicas = replicas_in(parse_groups([f"{NAME}:2"]), engine=EngineSettings(lease_s=LEASE_S))
        if kv_tokens is not None:
            replicas = [
                replace(
                    one,
                    instance=replace(one.instance, kv_capacity_tokens=kv_tokens, max_model_len=kv_tokens),
                )
                for one in replicas
            ]
        self.clock = VirtualClock(7.0)
        self.host = Host(clock=self.clock, chunks=make_chunks(chunks))
        for replica, engine_id in zip(replicas, ["a", "b"], strict=True):
            self.host.add(replica, engine_id)
        self.engines = self.host.instances
        self.said: dict[str, list[Output]] = {}
        for engine in self.engines:
            engine.sink = self._take

    def _take(self, outputs: list[Output]) -> None:
        for output in outputs:
            self.said.setdefault(output.request_id, []).append(output)

    def run(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.host.timer.catch_up()

    def tokens(self, request_id: str) -> list[int]:
        return [token for output in self.said.get(request_id, []) for token in output.token_ids]

    def last(self, request_id: str) -> Output:
        assert [output.finish_reason for output in self.said[request_id][:-1]].count(None) == len(
            self.said[request_id][:-1]
        ), "more than one end"
        return self.said[request_id][-1]


def leg(
    name: str,
    prompt: list[int],
    max_tokens: int,
    *,
    pin: bool = False,
    source: KvSource | None = None,
    generated: int = 0,
    ticket: Ticket | None = None,
    **sampling: object,
) -> GenerateRequest:
    params = SamplingParams(max_tokens=max_tokens, **sampling)  # type: ignore[arg-type]
    return GenerateRequest(
        name, tuple(prompt), params, generated=generated, pin_kv=pin, source=source, ticket=ticket
    )


def handle(engine_id: str, pinned: PinnedKv | None) -> KvSource:
    assert pinned is not None
    return KvSource(engine_id, pinned.request_id, "127.0.0.1", 1, pinned.block_ids, pinned.num_tokens)


async def test_a_leg_takes_what_the_profile_says_however_late_the_process_looks() -> None:
    emulated = Emulated()
    prompt = list(range(2000))
    emulated.engines[0].submit(leg("r", prompt, 3))
    emulated.run(5.0)
    times = emulated.last("r").times
    assert times is not None
    assert times.prefill_s == pytest.approx(PACKAGED.profile.prefill_s(2000), rel=1e-9)
    steps = [float(PACKAGED.profile.step.seconds(1.0, context)) for context in (2001.0, 2002.0)]
    assert times.decode_s == pytest.approx(sum(steps), rel=1e-9)
    assert emulated.tokens("r") == answer(prompt, 0, 3)
    assert len(emulated.said["r"]) == 1, "all that was due at once is one output"


@pytest.mark.parametrize("chunks", ["fixed", "slack"])
async def test_a_slack_budget_keeps_a_decode_in_time_beside_a_long_prompt(chunks: str) -> None:
    emulated, tpot_s = Emulated(chunks=chunks), 0.03
    engine = emulated.engines[0]
    engine.submit(leg("decode", list(range(100)), 5, ticket=Ticket(0.0, 0.5, 0.0, tpot_s=tpot_s)))
    emulated.run(0.012)
    engine.submit(leg("prompt", list(range(9000)), 2, ticket=Ticket(0.0, 0.5, 0.0, tpot_s=tpot_s)))
    emulated.run(5.0)
    times = emulated.last("decode").times
    assert times is not None
    assert (times.decode_s <= 4 * tpot_s) == (chunks == "slack")
    assert emulated.tokens("prompt") == answer(list(range(9000)), 0, 2)


async def test_a_hand_over_takes_the_links_time_and_goes_on_with_the_same_answer() -> None:
    emulated = Emulated()
    prompt = list(range(3000))
    emulated.engines[0].submit(leg("first", prompt, 1, pin=True))
    emulated.run(1.0)
    pinned = emulated.last("first").pinned
    assert pinned is not None and pinned.num_tokens == 3000
    assert emulated.engines[0].stats().pinned == 1
    first = emulated.tokens("first")
    source = handle("a", pinned)
    emulated.engines[1].submit(leg("second", prompt + first, 40, source=source, generated=1))
    emulated.run(5.0)
    times = emulated.last("second").times
    assert times is not None
    moved = 3000 * PACKAGED.kv_bytes_per_token
    assert times.kv_load_s == pytest.approx(float(PACKAGED.profile.transfer.seconds(moved)), rel=1e-9)
    assert times.kv_loaded_tokens == 3000
    assert first + emulated.tokens("second") == answer(prompt, 0, 41)
    assert emulated.engines[1].stats().pulled_bytes == moved
    for engine in emulated.engines:
        stats = engine.stats()
        assert (stats.pinned, stats.free_blocks) == (0, stats.total_blocks)


@pytest.mark.parametrize("wrong", ["unknown engine", "unknown request", "taken", "expired", "other length"])
async def test_kv_that_cannot_be_had_is_computed_again(wrong: str) -> None:
    emulated = Emulated()
    prompt = list(range(100))
    emulated.engines[0].submit(leg("first", prompt, 1, pin=True))
    emulated.run(1.0)
    source = handle("a", emulated.last("first").pinned)
    more = prompt + answer(prompt, 0, 1)
    if wrong == "unknown engine":
        source = replace(source, engine_id="c")
    elif wrong == "unknown request":
        source = replace(source, request_id="nobody")
    elif wrong == "taken":
        emulated.engines[1].submit(leg("thief", more, 2, source=source, generated=1))
    elif wrong == "expired":
        emulated.run(LEASE_S)
    else:
        more = prompt[:50]
    generated = max(0, len(more) - len(prompt))
    emulated.engines[1].submit(leg("second", more, 4, source=source, generated=generated))
    emulated.run(LEASE_S + 1.0)
    assert emulated.tokens("second") == answer(more[: len(more) - generated], generated, 4)
    times = emulated.last("second").times
    assert times is not None and times.kv_loaded_tokens == 0
    assert emulated.engines[1].stats().pull_failures == 1
    assert all(engine.stats().free_blocks == engine.stats().total_blocks for engine in emulated.engines)


async def test_a_prompt_whose_beginning_is_elsewhere_computes_the_rest() -> None:
    emulated = Emulated()
    prompt = list(range(100))
    emulated.engines[0].submit(leg("first", prompt, 1, pin=True))
    emulated.run(1.0)
    source = handle("a", emulated.last("first").pinned)
    more = [*prompt, *range(300, 350)]
    emulated.engines[1].submit(leg("second", more, 4, source=source))
    emulated.run(5.0)
    assert emulated.tokens("second") == answer(more, 0, 4)
    times = emulated.last("second").times
    assert times is not None and times.kv_loaded_tokens == 100
    assert all(engine.stats().free_blocks == engine.stats().total_blocks for engine in emulated.engines)


async def test_stops_end_an_answer_where_they_occur() -> None:
    emulated = Emulated()
    prompt = [5, 6, 7]
    whole = answer(prompt, 0, 30)
    emulated.engines[0].submit(leg("id", prompt, 30, stop_token_ids=(whole[11],)))
    emulated.engines[0].submit(leg("late", prompt, 30, stop_token_ids=(whole[2],), min_tokens=0))
    emulated.run(2.0)
    assert emulated.tokens("id") == whole[: whole.index(whole[11]) + 1]
    assert (emulated.last("id").finish_reason, emulated.last("id").stop_reason) == ("stop", whole[11])
    assert emulated.engines[0].stats().running == 0


operations = st.lists(
    st.one_of(
        st.tuples(
            st.just("submit"), st.integers(0, 1), st.integers(1, 400), st.integers(1, 60), st.booleans()
        ),
        st.tuples(st.just("wait"), st.floats(0.0, 0.3)),
        st.tuples(st.just("continue"), st.integers(0, 1)),
        st.tuples(st.just("abort"), st.integers(0, 30)),
        st.tuples(st.just("release"), st.integers(0, 30)),
    ),
    max_size=40,
)


@settings(max_examples=150)
@given(operations=operations)
def test_whatever_happens_to_legs_no_block_and_no_token_is_lost(operations: list[tuple[object, ...]]) -> None:
    asyncio.run(_random_life(operations))


async def _random_life(operations: list[tuple[object, ...]]) -> None:
    emulated = Emulated(kv_tokens=1024)
    sent: dict[str, tuple[int, list[int], int]] = {}
    aborted: set[str] = set()
    for operation in operations:
        match operation:
            case ("submit", int() as at, int() as length, int() as count, bool() as pin):
                name, prompt = f"r{len(sent)}", list(range(length))
                sent[name] = (at, prompt, 0)
                emulated.engines[at].submit(leg(name, prompt, count, pin=pin))
            case ("wait", float() as seconds):
                emulated.run(seconds)
            case ("continue", int() as at):
                done = [(n, e[-1]) for n, e in emulated.said.items() if e[-1].pinned is not None]
                for name, end in done[-1:]:
                    owner, prompt, generated = sent[name]
                    generated += len(emulated.tokens(name))
                    said = answer(prompt, 0, generated)
                    sent[f"r{len(sent)}"] = (at, prompt, generated)
                    source = handle("ab"[owner], end.pinned)
                    request = leg(f"r{len(sent) - 1}", prompt + said, 5, source=source, generated=generated)
                    emulated.engines[at].submit(request)
            case ("abort", int() as number) if f"r{number}" in sent:
                ends = emulated.said.get(f"r{number}", [])
                if not ends or ends[-1].finish_reason is None:
                    aborted.add(f"r{number}")
                emulated.engines[sent[f"r{number}"][0]].abort(f"r{number}")
            case ("release", int() as number) if f"r{number}" in sent:
                emulated.engines[sent[f"r{number}"][0]].release(f"r{number}")
    emulated.run(600.0)
    for name, (_, prompt, generated) in sent.items():
        tokens = emulated.tokens(name)
        assert tokens == answer(prompt, generated, len(tokens))
        assert (emulated.last(name).finish_reason == "abort") == (name in aborted)
    emulated.run(LEASE_S + 1.0)
    for engine in emulated.engines:
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.loading, stats.pinned) == (0, 0, 0, 0)
        assert stats.free_blocks == stats.total_blocks
