"""Requests end exactly once and blocks come back, whatever happens on the way."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engine.block_checks import check_blocks
from tests.engine.engine_harness import Driven, HandPuller, prompt_of, request, source_of
from tidegate.core.errors import BadRequest, ConfigError, NoInstance
from tidegate.engines.embedded.engine import EmbeddedEngine
from tidegate.engines.embedded.options import EngineConfig
from tidegate.engines.serving.types import Output, SamplingParams


@pytest.fixture(scope="module")
def small(llama: Path) -> Driven:
    """An engine whose pool is too small for its load, so that every run preempts."""
    return Driven(llama, total_blocks=24, dtype="float32", max_batch_tokens=48, max_num_seqs=12)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    script=st.lists(
        st.tuples(
            st.sampled_from(["submit", "submit", "abort", "step", "release", "expire"]),
            st.integers(0, 9),
            st.booleans(),
        ),
        max_size=60,
    )
)
def test_no_storm_leaks_blocks(small: Driven, script: list[tuple[str, int, bool]]) -> None:
    names: list[str] = []
    for count, (what, number, flag) in enumerate(script):
        if what == "submit":
            names.append(f"{id(script)}-{count}")
            prompt = prompt_of(3 + 13 * number, seed=number % 3)
            small.submit(request(names[-1], prompt, 1 + 9 * (number % 4), pin_kv=flag))
        elif what == "abort" and names:
            small.engine.abort(names[number % len(names)])
        elif what == "release" and names:
            small.engine.release(names[number % len(names)])
        elif what == "expire":
            small.clock.at_s += 31 * flag
        small.step()
        check_blocks(small.engine.scheduler)
    # Pins may hold every block, so that the last requests wait for leases to end.
    for _ in range(20):
        small.drain()
        small.clock.at_s += 31
    assert all(small.legs[name].reason for name in names)
    small.drain()
    small.assert_clean()


def test_preemption_happens_and_everyone_finishes(llama: Path) -> None:
    driven = Driven(llama, total_blocks=16, dtype="float32")
    legs = driven.run(*(request(f"r{n}", prompt_of(30, seed=n), 60) for n in range(6)))
    assert [len(leg.token_ids) for leg in legs] == [60] * 6
    assert driven.engine.stats().preemptions > 0
    driven.assert_clean()


def test_a_request_may_fill_the_whole_pool(llama: Path) -> None:
    driven = Driven(llama, total_blocks=4)
    assert driven.engine.max_model_len == 64
    driven.run(request("fits", prompt_of(60), 4))
    driven.assert_clean()


def test_a_stop_token_outside_the_vocabulary_is_refused(small: Driven) -> None:
    with pytest.raises(BadRequest) as caught:
        small.engine.submit(request("x", [5], stop_token_ids=(512,)))
    assert caught.value.param == "stop_token_ids"


def test_an_id_in_use_is_refused_and_free_again_afterwards(small: Driven) -> None:
    small.submit(request("twice", prompt_of(5), 2))
    with pytest.raises(BadRequest, match="in use"):
        small.engine.submit(request("twice", prompt_of(5), 2))
    small.drain()
    small.run(request("twice", prompt_of(5), 2))


def test_a_crashing_step_fails_its_requests_and_spares_the_rest(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driven = Driven(llama, max_num_seqs=2)
    for name in ("a", "b", "later"):
        driven.submit(request(name, prompt_of(20), 3))
    with monkeypatch.context() as patch:
        patch.setattr(driven.engine._runner, "run", lambda batch: 1 / 0)
        driven.step()
    driven.drain()
    assert [driven.legs[name].reason for name in ("a", "b", "later")] == ["error", "error", "length"]
    last = driven.legs["a"].last
    assert last and last.error == "ZeroDivisionError: division by zero"
    driven.assert_clean()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_broken_book_fails_everyone_and_takes_nothing_more(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = EmbeddedEngine(EngineConfig(llama, dtype="float32", total_blocks=64))
    monkeypatch.setattr(engine.scheduler, "schedule", lambda: 1 / 0)
    monkeypatch.setattr(engine.scheduler, "remove", lambda sequence: 1 / 0)
    sink = Collected()
    engine.start(sink)
    engine.submit(request("a", prompt_of(10), 4))
    sink.wait_for(1)
    assert sink.finished == {"a": "error"}
    assert engine._thread is not None
    engine._thread.join()
    with pytest.raises(NoInstance):
        engine.submit(request("b", prompt_of(10), 4))
    engine.stop()


def test_stale_memory_never_reaches_another_request(llama: Path) -> None:
    driven = Driven(llama, max_batch_tokens=32, max_num_seqs=8, total_blocks=64)
    wanted = [request(f"r{n}", prompt_of(7 + 19 * n, seed=n), 20) for n in range(4)]
    expected = [Driven(llama).run(one)[0].token_ids for one in wanted]
    driven.engine.store.buffer.fill_(float("nan"))
    assert [leg.token_ids for leg in driven.run(*wanted)] == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes_serve(llama: Path, dtype: str) -> None:
    driven = Driven(llama, dtype=dtype)
    legs = driven.run(*(request(f"r{n}", prompt_of(30 + n, seed=n), 12) for n in range(3)))
    assert [len(leg.token_ids) for leg in legs] == [12, 12, 12]
    assert driven.engine.model.kv.bytes_per_token == 2 * 2 * 2 * 32 * 2
    driven.assert_clean()


def test_a_pin_keeps_kv_until_its_lease_ends(llama: Path) -> None:
    driven = Driven(llama, lease_s=5.0)
    leg = driven.run(request("a", prompt_of(20), 3, pin_kv=True))[0]
    assert leg.last and leg.last.pinned
    pin = driven.engine.pins.pinned("a")
    assert pin == leg.last.pinned
    assert (pin.num_tokens, len(pin.block_ids)) == (22, 2)
    assert pin.deadline_s == driven.clock.now() + 5.0
    assert driven.engine.stats().pinned == 1
    assert driven.engine.stats().free_blocks == 254
    driven.clock.at_s += 5.0
    assert driven.engine.pins.pinned("a") is None
    driven.step()
    assert not driven.engine.release("a")
    driven.assert_clean()


def test_release_vouches_for_blocks_that_were_not_reused(llama: Path) -> None:
    driven = Driven(llama, lease_s=5.0)
    driven.run(request("a", prompt_of(20), 3, pin_kv=True))
    driven.clock.at_s += 6.0
    # The lease is over but nobody collected the blocks yet: what was read is still valid.
    assert driven.engine.release("a")
    assert not driven.engine.release("a")
    driven.step()
    driven.assert_clean()


def test_aborted_and_failed_requests_pin_nothing(llama: Path) -> None:
    driven = Driven(llama)
    driven.submit(request("a", prompt_of(20), 30, pin_kv=True))
    driven.step()
    driven.engine.abort("a")
    driven.drain()
    assert driven.legs["a"].reason == "abort"
    assert driven.engine.pins.pinned("a") is None
    driven.assert_clean()


def test_an_abort_in_a_requests_last_step_pins_nothing(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driven = Driven(llama)
    driven.submit(request("a", prompt_of(20), 1, pin_kv=True))
    compute = driven.engine._runner.run

    def meanwhile(batch: Any) -> Any:
        driven.engine.abort("a")
        assert not driven.engine.release("a"), "there is no pin yet"
        return compute(batch)

    monkeypatch.setattr(driven.engine._runner, "run", meanwhile)
    driven.step()
    driven.step()
    assert driven.engine.pins.pinned("a") is None
    driven.assert_clean()


class Pair:
    """A finished pinned leg on one engine and another engine that may pull it."""

    def __init__(self, model: Path, prompt_len: int = 50, **here: Any) -> None:
        self.there = Driven(model, engine_id="there")
        self.here = Driven(model, engine_id="here", **here)
        self.puller = HandPuller(self.here.engine, {"there": self.there.engine})
        self.here.engine.scheduler.puller = self.puller
        self.prompt = prompt_of(prompt_len)
        self.head = self.there.run(request("head", self.prompt, 4, pin_kv=True))[0]
        self.whole = self.there.run(request("whole", self.prompt, 14))[0].token_ids

    def tail(self, request_id: str = "tail", **changes: Any) -> Any:
        ids = self.head.token_ids
        return request(
            request_id,
            self.prompt + ids,
            10,
            generated=len(ids),
            source=source_of(self.there, "head"),
            **changes,
        )

    def finish(self) -> None:
        self.there.drain()
        self.there.clock.at_s += 31
        self.there.drain()
        self.here.assert_clean()
        self.there.assert_clean()


def test_a_failed_pull_is_computed_instead(llama: Path) -> None:
    pair = Pair(llama)
    pair.here.submit(pair.tail())
    pair.here.drain()
    pair.puller.deliver(error="the peer is gone")
    pair.here.drain()
    assert pair.head.token_ids + pair.here.legs["tail"].token_ids == pair.whole
    stats = pair.here.engine.stats()
    assert (stats.pull_failures, stats.pulled_prompt_tokens) == (1, 0)
    assert stats.computed_prompt_tokens == 54
    pair.finish()


def test_a_puller_that_raises_or_lacks_is_a_failed_pull(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(llama)
    monkeypatch.setattr(pair.puller, "submit", lambda *_: 1 / 0)
    unconnected = Driven(llama, engine_id="unconnected")
    for driven in (pair.here, unconnected):
        tail = driven.run(pair.tail())[0]
        assert pair.head.token_ids + tail.token_ids == pair.whole
        assert driven.engine.stats().pull_failures == 1
    unconnected.assert_clean()
    pair.finish()


def test_others_compute_while_a_pull_is_under_way(llama: Path) -> None:
    pair = Pair(llama)
    pair.here.submit(pair.tail())
    assert pair.here.run(request("other", prompt_of(30, seed=9), 5))[0].reason == "length"
    assert pair.here.engine.stats().loading == 1
    pair.puller.deliver()
    pair.here.drain()
    assert pair.here.legs["tail"].reason == "length"
    pair.finish()


def test_an_abort_during_a_pull_frees_the_blocks_only_when_it_is_done(llama: Path) -> None:
    pair = Pair(llama)
    pair.here.submit(pair.tail())
    pair.here.step()
    pair.here.engine.abort("tail")
    pair.here.step()
    assert pair.here.legs["tail"].reason == "abort"
    stats = pair.here.engine.stats()
    assert (stats.loading, stats.free_blocks) == (1, stats.total_blocks - 4)
    pair.puller.deliver()
    pair.here.drain()
    pair.finish()


def test_an_aborted_waiting_request_releases_its_source(llama: Path) -> None:
    pair = Pair(llama, max_num_seqs=1)
    pair.here.submit(request("busy", prompt_of(5), 30))
    pair.here.step()
    pair.here.submit(pair.tail())
    pair.here.step()
    pair.here.engine.abort("tail")
    pair.here.drain()
    ((source, blocks, _),) = pair.puller.jobs
    assert (source.request_id, blocks) == ("head", [])
    pair.puller.deliver()
    assert pair.there.engine.pins.pinned("head") is None
    pair.finish()


def test_a_pull_is_skipped_when_the_prefix_is_here(llama: Path) -> None:
    pair = Pair(llama)
    pair.here.run(request("earlier", pair.prompt + pair.head.token_ids, 1))
    pair.here.submit(pair.tail())
    pair.here.drain()
    assert pair.head.token_ids + pair.here.legs["tail"].token_ids == pair.whole
    assert [blocks for _, blocks, _ in pair.puller.jobs] == [[]]
    pair.puller.deliver()
    assert pair.there.engine.pins.pinned("head") is None
    assert pair.here.engine.stats().pulled_prompt_tokens == 0
    pair.finish()


def test_an_adopted_block_with_another_reader_is_not_written(llama: Path) -> None:
    driven = Driven(llama)
    prompt = prompt_of(61)
    head = driven.run(request("head", prompt, 4, pin_kv=True))[0]
    ids = prompt + head.token_ids
    driven.submit(request("reader", ids, 20))
    driven.step()
    source = source_of(driven, "head")
    assert source.num_tokens == 64
    shared = driven.engine.store.buffer[source.block_ids[3]]
    shared[:, :, -1] += 1e-6
    before = shared.clone()
    driven.run(request("tail", ids[:64], 3, source=source))
    assert torch.equal(shared, before)
    driven.assert_clean()


def test_tenants_do_not_share_prefixes(llama: Path) -> None:
    driven = Driven(llama)
    prompt = prompt_of(40)
    driven.run(request("a", prompt, 1, salt="one"))
    legs = driven.run(request("b", prompt, 1, salt="two"), request("c", prompt, 1, salt="one"))
    assert [leg.last.times.cached_tokens for leg in legs if leg.last and leg.last.times] == [0, 32]


@pytest.mark.parametrize("shown", [10, 32, 48, 52, 54, 70])
def test_a_source_shorter_or_longer_than_the_prompt(llama: Path, shown: int) -> None:
    pair = Pair(llama)
    ids = (pair.prompt + pair.whole)[:shown]
    expected = Driven(llama).run(request("x", ids, 6))[0].token_ids
    if shown == 70:
        ids = (pair.prompt + pair.whole)[:64]
        expected = Driven(llama).run(request("x", ids, 6))[0].token_ids
    pair.here.submit(request("cut", ids, 6, source=source_of(pair.there, "head")))
    pair.here.drain()
    pair.puller.deliver()
    pair.here.drain()
    leg = pair.here.legs["cut"]
    assert leg.token_ids == expected
    stats = pair.here.engine.stats()
    assert stats.computed_prompt_tokens == len(ids) - stats.pulled_prompt_tokens
    assert stats.pulled_prompt_tokens in (0, min(53, len(ids) - 1))
    pair.finish()


def test_the_pulled_prefix_is_found_by_the_next_request(llama: Path) -> None:
    pair = Pair(llama)
    pair.here.submit(pair.tail())
    pair.here.step()
    pair.puller.deliver()
    pair.here.drain()
    again = pair.here.run(request("again", pair.prompt, 1))[0]
    assert again.last and again.last.times and again.last.times.cached_tokens == 48
    pair.finish()


def test_stages_add_up(llama: Path) -> None:
    driven = Driven(llama)
    driven.submit(request("a", prompt_of(20), 3))
    driven.clock.at_s += 1.0
    driven.step()
    driven.clock.at_s += 2.0
    driven.drain()
    last = driven.legs["a"].last
    assert last and last.times
    assert (last.times.queue_s, last.times.prefill_s, last.times.decode_s) == (1.0, 0.0, 2.0)


def test_a_batch_bound_below_the_sequence_bound_is_a_config_error(llama: Path) -> None:
    with pytest.raises(ConfigError, match="max_batch_tokens"):
        EngineConfig(llama, max_batch_tokens=8, max_num_seqs=9)


class Collected:
    """An output sink that a test can wait on."""

    def __init__(self) -> None:
        self.outputs: list[Output] = []
        self.finished: dict[str, str] = {}
        self._change = threading.Condition()

    def __call__(self, outputs: list[Output]) -> None:
        with self._change:
            self.outputs += outputs
            for output in outputs:
                if output.finish_reason is not None:
                    assert output.request_id not in self.finished
                    self.finished[output.request_id] = output.finish_reason
            self._change.notify_all()

    def wait_for(self, count: int) -> None:
        with self._change:
            assert self._change.wait_for(lambda: len(self.finished) >= count, timeout=30)


def test_the_running_loop_serves_threads_and_stops_cleanly(llama: Path) -> None:
    engine = EmbeddedEngine(EngineConfig(llama, dtype="float32", total_blocks=64, lease_s=0.05))
    sink = Collected()
    engine.start(sink)

    def client(name: str) -> None:
        for n in range(5):
            engine.submit(request(f"{name}-{n}", prompt_of(20 + n), 5, pin_kv=n == 4))
            if n == 3:
                engine.abort(f"{name}-{n}")

    threads = [threading.Thread(target=client, args=(f"t{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sink.wait_for(20)
    assert set(sink.finished.values()) <= {"length", "abort"}
    engine.submit(request("endless", prompt_of(10), 900))
    engine.stop()
    assert sink.finished["endless"] == "abort"
    check_blocks(engine.scheduler)
    with pytest.raises(NoInstance, match="stopping"):
        engine.submit(request("late", prompt_of(5), 1))


def test_a_failing_sink_does_not_end_the_loop(llama: Path) -> None:
    engine = EmbeddedEngine(EngineConfig(llama, dtype="float32", total_blocks=64))
    sink = Collected()
    calls = []

    def failing(outputs: list[Output]) -> None:
        calls.append(outputs)
        sink(outputs)
        if len(calls) == 1:
            raise RuntimeError("the reader is gone")

    engine.start(failing)
    engine.submit(request("a", prompt_of(10), 4))
    sink.wait_for(1)
    engine.stop()
    assert len(calls) == 4


def test_sampling_defaults_serve(small: Driven) -> None:
    leg = small.run(request("default", prompt_of(5), SamplingParams().max_tokens, temperature=1.0))[0]
    assert len(leg.token_ids) == 16
