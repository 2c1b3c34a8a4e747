"""Closed loops, and sweeps over rates or users."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.bench.fake_openai import DEFAULTS, FakeOpenAI, Offer, serving
from tests.reports.test_run_page import charts_of
from tidegate.bench import Load
from tidegate.core.errors import ConfigError
from tidegate.core.slo import Slo
from tidegate.measure.results import RequestResult, read_results
from tidegate.reports.bench_report import BenchReport, build_bench_report
from tidegate.reports.sweep_report import Sweep, sweep_page
from tidegate.workloads.choice import WorkloadChoice
from tidegate.workloads.readers import read_trace
from tidegate.workloads.trace import TraceRecord


@dataclass
class Counting(FakeOpenAI):
    """Counts the requests that are under way: each waits until ``together`` are, or all have come."""

    total: int = 0
    together: int = 1
    under_way: int = 0
    most: int = 0
    left: int = 0

    async def _stream(
        self, request: web.Request, body: dict[str, Any], usage: dict[str, int], plan: str
    ) -> web.StreamResponse:
        async with self.arrived:
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            self.arrived.notify_all()
            await self.arrived.wait_for(
                lambda: self.under_way >= self.together or len(self.bodies) == self.total or self.left
            )
            self.left += 1
            self.arrived.notify_all()
        try:
            return await super()._stream(request, body, usage, plan)
        finally:
            self.under_way -= 1


async def test_a_closed_loop_keeps_so_many_requests_under_way_and_no_more(
    offer: Offer, tmp_path: Path
) -> None:
    # The trace says that all come at once, and one refusal must not cost a user.
    fake = Counting(total=30, together=4, plan=lambda size: "reject" if size == 21 else "ok")
    records = [TraceRecord(0.0, 20 + n, 3) for n in range(30)]
    out = tmp_path / "run.jsonl"
    done = await offer(fake, records, out=out, settings=replace(DEFAULTS, concurrency=4, slo=Slo(60, 60)))
    assert fake.most == 4 and len(fake.bodies) == 30
    assert done.report.outcomes == {"ok": 29, "http 429": 1} and done.report.concurrency == 4
    found = read_results(out)
    assert found.header["concurrency"] == 4
    waited = [result.arrival_s for result in found.results]
    assert waited == sorted(waited) and waited[4] > 0, "a request comes when it is sent"


async def test_a_stopped_closed_loop_ends_what_is_under_way(offer: Offer) -> None:
    fake = FakeOpenAI(plan=lambda size: "stall")
    records = [TraceRecord(0.0, 5, 1)] * 50
    done = await offer(fake, records, stop_at=3, settings=replace(DEFAULTS, concurrency=3))
    assert done.interrupted and len(fake.bodies) == done.report.interrupted == 3


@pytest.mark.parametrize(
    ("choice", "rate_rps", "users", "problem"),
    [
        ({"poisson": 2.0, "limit": 5}, 4.0, None, "--rate sets when requests come; drop --poisson"),
        ({"trace": "t", "scale_rate": 2.0}, 4.0, None, "drop --scale-rate"),
        ({"bursts": "2:1", "limit": 5}, None, 4, "--concurrency .* drop --bursts"),
        ({"limit": 5}, 2.0, 4, "drop --rate"),
        ({}, None, 4, "--limit"),
        ({"limit": 5}, 0.0, None, "positive"),
    ],
)
def test_loads_that_contradict_themselves(
    choice: dict[str, object], rate_rps: float | None, users: int | None, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        Load(WorkloadChoice(**choice), replace(DEFAULTS, concurrency=users), rate_rps)  # type: ignore[arg-type]


def test_a_rate_scales_a_trace_and_else_draws(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("arrival_s,input_tokens,output_tokens\n" + "".join(f"{n},9,9\n" for n in range(5)))
    scaled = Load(WorkloadChoice(trace=str(path)), DEFAULTS, 4.0).records()
    assert [record.arrival_s for record in scaled] == [0.0, 0.25, 0.5, 0.75, 1.0]
    drawn = Load(WorkloadChoice(limit=400), DEFAULTS, 4.0).records()
    assert 399 / drawn[-1].arrival_s == pytest.approx(4.0, rel=0.15)
    one, other = (Load(WorkloadChoice(limit=4), DEFAULTS, rate).drawn_apart() for rate in (1.0, 2.0))
    assert one.settings.seed != other.settings.seed, "the prompts of one load are cached when the other runs"


SWEEP = ("--limit", "8", "--output-tokens", "2", "--slo", "ttft:60000,tpot:60000")


async def tidegate(*words: object, stop: Callable[[], Awaitable[None]] | None = None) -> tuple[int, str, str]:
    """Run the command, interrupted when ``stop`` returns; return its status and what it wrote."""
    pipe = asyncio.subprocess.PIPE
    command = (sys.executable, "-m", "tidegate", *map(str, words))
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
    if stop is not None:
        await stop()
        process.send_signal(signal.SIGINT)
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


async def test_a_sweep_has_a_row_per_load_and_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    folder = tmp_path / "users"
    held = {"stall"}
    fake = FakeOpenAI(plan=lambda size: "stall" if held and len(fake.bodies) > 8 else "ok")
    async with serving(fake) as url:
        command = ("bench", "--url", url, *SWEEP, "--out", folder, "--concurrency", "1,4")
        status, table, said = await tidegate(*command, stop=lambda: fake.received(10))
        assert status == 130 and "the same command goes on from there" in said
        assert re.search(r"(?m)^ +1 +8 +0 +100.0 %", table) and "up to 1 user" in table
        assert [path.name for path in folder.glob("*.jsonl")] == ["concurrency-1.jsonl"]
        held.clear()
        before = (folder / "concurrency-1.jsonl").read_bytes()
        status, table, said = await tidegate(*command)
        assert status == 0 and len(re.findall(r"(?m)^ +[14] +8 +0 +100.0 %", table)) == 2
        assert "concurrency-1; what is there is not offered again" in said
        assert (folder / "concurrency-1.jsonl").read_bytes() == before
        status, _, said = await tidegate(*command, "--seed", "3")
        assert status == 2 and "is of another run (seed" in said
        status, _, said = await tidegate(
            "bench", "--url", url, *SWEEP, "--rate", "9", "--out", folder / "concurrency-1.jsonl"
        )
        assert status == 2 and "never written over" in said
    prompts = [json.dumps(body["prompt"]) for body in fake.bodies]
    assert len(set(prompts)) == 16, "a load's prompts are not those of another, or a cache would have them"
    page = tmp_path / "page.html"
    status, again, _ = await tidegate("report", folder, "--out", page)
    assert status == 0 and again == table
    assert "<h1>90 % attained ttft:60000,tpot:60000 up to 4 users" in page.read_text()


def made(load: int, met: int, *, users: int | None) -> BenchReport:
    """Return the report of a hundred requests of which ``met`` were fast enough."""
    results = [
        RequestResult(n, 1000.0 * n / load, 9, 2, "ok", n / load, ttft_s=0.1 if n < met else 2.0, tpot_s=0.01,
                      e2e_s=0.2, output_tokens=2, counted_tokens=2)
        for n in range(100)
    ]  # fmt: skip
    return build_bench_report(results, Slo(1, 1), concurrency=users)


def test_a_sweep_answers_up_to_which_load_the_level_is_met() -> None:
    found = Sweep.of([made(4, 60, users=None), made(1, 99, users=None), made(2, 93, users=None)])
    assert [round(found.load(report)) for report in found.reports] == [1, 2, 4]
    answer = "90 % attained ttft:1000,tpot:1000 up to 2.00 requests/s; at 4.00 requests/s it was 60.0 %"
    assert found.answer() == answer and f"<h1>{answer}</h1>" in sweep_page(found)
    none = Sweep.of([made(1, 10, users=3), made(1, 5, users=7)])
    assert none.answer() == "3 users, the least load, 10.0 % attained ttft:1000,tpot:1000: 90 % is missed"
    charts = charts_of(sweep_page(found))
    assert [round(x) for x in charts[0]["curves"][0]["xs"]] == [1, 2, 4]  # type: ignore[index]
    assert charts[0]["curves"][0]["ys"] == [99.0, 93.0, 60.0]  # type: ignore[index]


async def test_open_and_closed_loops_are_not_mixed(tmp_path: Path) -> None:
    async with serving(FakeOpenAI()) as url:
        for name, load in (("a", ("--rate", "99")), ("b", ("--concurrency", "2"))):
            out = tmp_path / f"{name}.jsonl"
            assert (await tidegate("bench", "--url", url, *SWEEP, *load, "--out", out))[0] == 0
    status, _, said = await tidegate("report", tmp_path)
    assert status == 2 and "open and closed loops" in said


CLASSES = "arrival_s,input_tokens,output_tokens,slo_class\n0,20,2,chat\n0,21,2,batch\n0,22,2,\n0,23,2,chat\n"


async def test_classes_of_a_trace_have_targets_of_their_own(tmp_path: Path) -> None:
    trace, out = tmp_path / "t.csv", tmp_path / "run.jsonl"
    trace.write_text(CLASSES)
    fake = FakeOpenAI(plan=lambda size: "reject" if size == 23 else "ok")
    async with serving(fake) as url:
        words = ("bench", "--url", url, "--trace", trace, "--slo", "ttft:60000,tpot:60000", "--slo-headers")
        chat = ("--slo-class", "chat=ttft:50000,tpot:40000")
        status, block, said = await tidegate(*words, *chat, "--out", out)
        assert status == 1 and "no --slo-class for batch: scored by ttft:60000,tpot:60000" in said
        assert re.search(r"chat, ttft:50000,tpot:40000 \(%\): +50\.00\n", block)
        assert re.search(r"batch, ttft:60000,tpot:60000 \(%\): +100\.00\n", block)
        sent = {
            len(body["prompt"]): head["x-slo-ttft-ms"]
            for body, head in zip(fake.bodies, fake.headers, strict=True)
        }
        assert sent == {20: "50000", 21: "60000", 22: "60000", 23: "50000"}
        status, _, said = await tidegate(*words, "--slo-class", "caht=ttft:1,tpot:1")
        assert status == 2 and "did you mean 'chat'? it has batch, chat" in said
    page = tmp_path / "page.html"
    status, report, _ = await tidegate("report", out, "--json", "--out", page)
    shares = {name: found["attainment"] for name, found in json.loads(report)["classes"].items()}
    assert shares == {"": 1.0, "batch": 1.0, "chat": 0.5}
    assert "chat, ttft:50000,tpot:40000" in page.read_text()
    kept = {record.input_tokens: record.slo_class for record in read_trace(out)}
    assert kept == {20: "chat", 21: "batch", 22: "", 23: "chat"}
