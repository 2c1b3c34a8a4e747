"""What the load client promises, against a server that misbehaves."""

from __future__ import annotations

import asyncio
import json
from array import array
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from msgspec import structs

from tests.bench.fake_openai import DEFAULTS, FakeOpenAI, Offer, serving
from tidegate.bench import BenchSettings
from tidegate.bench.client import LoadClient
from tidegate.bench.endpoint import Endpoint
from tidegate.bench.run import Recorder
from tidegate.bench.settings import PromptForm
from tidegate.core.errors import ConfigError
from tidegate.core.slo import Slo
from tidegate.measure.results import RequestResult, Targets, read_results
from tidegate.reports.bench_report import build_bench_report
from tidegate.workloads.prompts import TokenPrompts
from tidegate.workloads.readers import read_trace
from tidegate.workloads.trace import TraceRecord


def requests(count: int, *, every_s: float = 0.002, tokens: int = 3) -> list[TraceRecord]:
    return [TraceRecord(i * every_s, 20 + i, tokens) for i in range(count)]


async def test_a_stalled_server_does_not_hold_back_later_sends(offer: Offer) -> None:
    # Nothing is ever answered, so any wait for an answer would keep the 200th request from arriving.
    fake = FakeOpenAI(plan=lambda size: "stall")
    done = await offer(fake, requests(200), stop_at=200)
    assert len(fake.bodies) == 200
    assert done.interrupted
    assert done.report.interrupted == 200
    assert done.report.attainment.offered == 0


class LateClock:
    """Reads 0 once, when the run starts, and 100 ever after: a client that fell 100 s behind."""

    def __init__(self) -> None:
        self.readings = 0

    def now(self) -> float:
        self.readings += 1
        return 0.0 if self.readings == 1 else 100.0


async def test_a_late_client_is_counted_against_the_run() -> None:
    found: list[RequestResult] = []
    endpoint = Endpoint("fake", TokenPrompts(vocab=256))
    async with serving(FakeOpenAI()) as url, aiohttp.ClientSession() as session:
        client = LoadClient(
            session, BenchSettings(url), endpoint, lambda result, gaps: found.append(result), LateClock()
        )
        await client.run([TraceRecord(2.0, 5, 3)], asyncio.Event())
    assert (found[0].sent_s, found[0].ttft_s, found[0].e2e_s) == (100.0, 98.0, 98.0)
    report = build_bench_report(found, Slo(1, 1))
    assert report.late_sends == 1
    assert report.attainment.attained == 0
    assert "could not keep up" in report.notes[0]


async def test_every_end_is_recorded_once_and_misses_count(offer: Offer, tmp_path: Path) -> None:
    plans = ["ok", "reject", "error", "cut", "unfinished", "ok"]
    out = tmp_path / "run.jsonl"
    done = await offer(
        FakeOpenAI(plan=lambda size: plans[size - 20]),
        requests(6, every_s=0.05),
        out=out,
        settings=replace(DEFAULTS, slo=Slo(60, 60)),
    )
    recorded = read_results(out)
    assert [r.index for r in recorded.results] == [0, 1, 2, 3, 4, 5]
    outcomes = [r.outcome for r in recorded.results]
    assert outcomes == ["ok", "http 429", "stream", "stream", "stream", "ok"]
    assert recorded.results[2].error == "the engine died"
    assert "without a finish_reason" in recorded.results[4].error
    assert (done.report.attainment.offered, done.report.attainment.attained) == (6, 2)
    assert done.report.failed == 4
    assert recorded.summary is not None
    assert recorded.summary["attainment"]["attained"] == 2


def test_a_killed_client_leaves_what_had_finished(tmp_path: Path) -> None:
    out = tmp_path / "run.jsonl"
    with closing(Recorder(Targets(Slo()), out.open("w"))) as recorder:
        recorder.write({"type": "bench", "model": "fake"})
        recorder.add(RequestResult(0, 0.0, 5, 3, "ok", 0.0, 200, ttft_s=0.1), array("d"))
        on_disk = read_results(out)
    assert [r.ttft_s for r in on_disk.results] == [0.1]
    assert on_disk.summary is None


async def test_a_result_file_is_a_trace_of_what_was_offered(offer: Offer, tmp_path: Path) -> None:
    out = tmp_path / "run.jsonl"
    sent = requests(5)
    await offer(FakeOpenAI(plan=lambda size: "reject" if size == 21 else "ok"), sent, out=out)
    assert [(r.input_tokens, r.output_tokens) for r in read_trace(out)] == [(20 + i, 3) for i in range(5)]


async def test_a_request_past_its_deadline_is_a_timeout(offer: Offer) -> None:
    done = await offer(
        FakeOpenAI(plan=lambda size: "stall"), requests(2), settings=replace(DEFAULTS, timeout_s=0.5)
    )
    assert done.report.outcomes == {"timeout": 2}
    assert not done.interrupted


async def test_stopping_reports_what_finished(offer: Offer) -> None:
    fake = FakeOpenAI(plan=lambda size: "ok" if size == 5 else "stall")
    records = [TraceRecord(0.0, 5, 1), TraceRecord(0.2, 6, 1), TraceRecord(3600.0, 7, 1)]
    done = await offer(fake, records, stop_at=2)
    assert done.interrupted
    assert len(fake.bodies) == 2
    assert done.report.interrupted >= 1
    assert done.report.attainment.offered + done.report.interrupted == 2


async def test_bodies_ask_for_exact_lengths_as_token_ids(offer: Offer) -> None:
    fake = FakeOpenAI(vocab=3000)
    await offer(
        fake,
        [TraceRecord(0, 30, 7, (1,), session_id="s9")],
        settings=replace(DEFAULTS, slo_headers=True, slo=Slo(0.5, 0.05)),
    )
    body, headers = fake.bodies[0], fake.headers[0]
    assert len(body["prompt"]) == 30
    assert all(250 <= token < 2000 for token in body["prompt"])  # the largest vocabulary it took
    assert (body["max_tokens"], body["ignore_eos"], body["temperature"]) == (7, True, 0.0)
    assert body["stream_options"] == {"include_usage": True}
    assert body["model"] == "fake"
    assert headers["x-session-id"] == "s9"
    assert (headers["x-slo-ttft-ms"], headers["x-slo-tpot-ms"]) == ("500", "50")


async def test_ignore_eos_can_be_left_out_for_endpoints_that_refuse_it(offer: Offer) -> None:
    fake = FakeOpenAI()
    await offer(fake, requests(1), settings=replace(DEFAULTS, ignore_eos=False))
    assert "ignore_eos" not in fake.bodies[0]


@pytest.mark.parametrize("chat", [False, True])
async def test_text_prompts_are_calibrated(offer: Offer, chat: bool) -> None:
    fake = FakeOpenAI(vocab=0, tokens_per_word=3, overhead=9)
    done = await offer(fake, [TraceRecord(0, 309, 2)], settings=replace(DEFAULTS, chat=chat))
    prompt = fake.bodies[0]["messages"][0]["content"] if chat else fake.bodies[0]["prompt"]
    assert len(prompt.split()) == 100
    assert done.prompt_form == "text"
    assert done.report.input_tokens == 309
    assert done.report.output_tokens == 2
    assert done.report.notes == ()


async def test_an_endpoint_that_cannot_serve_the_run_is_refused_before_load(offer: Offer) -> None:
    with pytest.raises(ConfigError, match="several models; choose one with --model: a, b"):
        await offer(FakeOpenAI(models=("a", "b")), requests(1))
    with pytest.raises(ConfigError, match="still starting"):
        await offer(FakeOpenAI(models=()), requests(1))
    with pytest.raises(ConfigError, match="TIDEGATE_API_KEY"):
        await offer(FakeOpenAI(api_key="secret"), requests(1))
    with pytest.raises(ConfigError, match="does not take token-id prompts"):
        await offer(
            FakeOpenAI(vocab=0), requests(1), settings=replace(DEFAULTS, prompt_form=PromptForm.TOKENS)
        )
    done = await offer(
        FakeOpenAI(api_key="secret"), requests(1), settings=replace(DEFAULTS, api_key="secret")
    )
    assert done.report.successful == 1


async def test_an_unwritable_result_file_is_refused(offer: Offer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write"):
        await offer(FakeOpenAI(), requests(1), out=tmp_path / "no" / "where.jsonl")


async def test_the_result_file_tells_how_the_run_was_made(offer: Offer, tmp_path: Path) -> None:
    out = tmp_path / "run.jsonl"
    await offer(FakeOpenAI(), requests(2), out=out, settings=replace(DEFAULTS, seed=5, slo=Slo(0.3, 0.02)))
    kinds = [json.loads(line)["type"] for line in out.read_text().splitlines()]
    assert kinds == ["bench", "request", "request", "summary"]
    header = read_results(out).header
    assert (header["model"], header["prompt_form"], header["seed"]) == ("fake", "tokens", 5)
    assert header["slo"] == {"ttft_s": 0.3, "tpot_s": 0.02}


def test_gaps_between_events_are_called_so_where_events_hold_several_tokens() -> None:
    one = RequestResult(0, 0.0, 5, 8, "ok", 0.0, ttft_s=0.1, e2e_s=0.2, output_tokens=8, counted_tokens=2)
    assert any("holds 4.0 tokens on average" in note for note in build_bench_report([one], Slo(1, 1)).notes)
    single = structs.replace(one, counted_tokens=8)
    assert not any("on average" in note for note in build_bench_report([single], Slo(1, 1)).notes)
