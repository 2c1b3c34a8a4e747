"""The check finds what is wrong with a fleet, names it, never hangs, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from tests.check.fake_vllm import FakeVllm, Fault, StartFleet
from tidegate.check.context import CheckSettings
from tidegate.check.run import check_fleet
from tidegate.check.server import Deadlines
from tidegate.check.verdict import CheckReport, CheckVerdict
from tidegate.cli.main import main
from tidegate.core.instance import Role
from tidegate.core.slo import Slo

QUICK = Deadlines(ask_s=2.0, leg_s=3.0, dead_peer_s=2.0)
HANGING = Deadlines(ask_s=1.0, leg_s=1.0, dead_peer_s=0.8)
"""For fleets in which a server hangs, so that every one of these is waited for in full."""


async def check(
    servers: list[FakeVllm],
    roles: tuple[Role | None, ...] = (),
    slo: Slo | None = None,
    deadlines: Deadlines = QUICK,
) -> CheckReport:
    roles = roles or (None,) * len(servers)
    asked = tuple((each.url, role) for each, role in zip(servers, roles, strict=True))
    return await check_fleet(CheckSettings(asked, slo=slo), lambda share, what: None, deadlines=deadlines)


def red(report: CheckReport) -> list[tuple[str, tuple[str, ...]]]:
    return [(each.probe, each.where) for each in report.findings if each.verdict is CheckVerdict.RED]


def told(report: CheckReport, probe: str) -> str:
    return "\n".join(f"{each.observed} {each.change}" for each in report.findings if each.probe == probe)


async def test_a_good_fleet_is_all_green_and_keeps_nothing_pinned(fleet: StartFleet) -> None:
    # What a stream decoded stays pinned only shortly: the end of that is no early end of a lease.
    servers = await fleet(*(Fault(decoded_s=0.05) for _ in range(3)))
    report = await check(servers, slo=Slo(1.0, 0.5))
    assert report.ok
    assert {each.verdict for each in report.findings} == {CheckVerdict.GREEN}
    pulls = {each.where for each in report.findings if each.probe == "KV pull"}
    assert len(pulls) == 6
    assert not any(server.pinned for server in servers)
    assert all(server.nixl_bytes for server in servers)


@pytest.mark.parametrize(
    ("fault", "probe", "words"),
    [
        (Fault(model="other"), "model", "serves other; the others: serves tiny"),
        (Fault(weights=1), "same answers", "another model"),
        (Fault(tokenizer_shift=1), "tokenizer", "--tokenizer"),
        (Fault(block_tokens=32), "block size", "32 tokens; the others: 16 tokens"),
        (Fault(version="0.33.0"), "version", "0.33.0"),
        (Fault(recompute=True), "failure policy", "recompute"),
        (Fault(bidirectional=False), "bidirectional reads", "bidirectional_kv_xfer"),
        (Fault(side_channel_open=False), "side channel", "blocked"),
        (Fault(prefix_cache=False), "prefix cache", "prefix cache off"),
        (Fault(connector=False), "KV handle", "no KV transfer"),
        (Fault(garbles_kv=True), "KV pull", "wrong tokens"),
        (Fault(lease_s=0.05), "lease", "kv_lease_duration"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
async def test_a_planted_fault_is_named(fleet: StartFleet, fault: Fault, probe: str, words: str) -> None:
    servers = await fleet(Fault(), Fault(), fault)
    report = await check(servers)
    assert not report.ok
    assert words in told(report, probe)
    blamed = {where for each, where in red(report) if each == probe}
    assert blamed and all("i2" in where for where in blamed)
    assert not any("i2" not in where for _, where in red(report)), "another server is blamed"
    assert not any(server.hung for server in servers), "a request was sent that can never be answered"


async def test_a_server_that_only_produces_is_told_but_served_around(fleet: StartFleet) -> None:
    report = await check(await fleet(Fault(), Fault(), Fault(producer_only=True)))
    assert report.ok
    assert "fixed role: started as kv_producer" in told(report, "role")


async def test_a_pull_that_works_the_second_time_is_told_and_not_held_against_anybody(
    fleet: StartFleet,
) -> None:
    report = await check(await fleet(Fault(), Fault(slow_handshakes=1)))
    assert report.ok
    assert "first of two pulls failed: HTTP 500" in told(report, "KV pull")
    assert {each.where for each in report.findings if each.probe == "flip without restart"} == {("i0", "i1")}


async def test_a_member_that_keeps_its_role_is_only_asked_for_that(fleet: StartFleet) -> None:
    servers = await fleet(Fault(), Fault())
    report = await check(servers, roles=(Role.PREFILL, Role.DECODE))
    assert {each.where for each in report.findings if each.probe == "KV pull"} == {("i0", "i1")}
    assert report.ok
    assert not any(server.pinned for server in servers)


@pytest.mark.parametrize("path", ["/health", "/metrics", "/tokenize", "/v1/completions"])
async def test_a_server_that_hangs_is_named_and_the_rest_is_checked(fleet: StartFleet, path: str) -> None:
    servers = await fleet(Fault(), Fault(), Fault(hangs=frozenset({path})))
    began_s = time.monotonic()
    report = await check(servers, deadlines=HANGING)
    assert time.monotonic() - began_s < 20
    assert red(report) and {where for _, where in red(report)} == {("i2",)}
    assert {each.where for each in report.findings if each.probe == "flip without restart"} == {("i0", "i1")}


async def test_pulls_that_hang_end_by_their_deadline(fleet: StartFleet) -> None:
    servers = await fleet(Fault(), Fault(), Fault(hangs_on_pull=True))
    report = await check(servers, deadlines=HANGING)
    assert ("KV pull", ("i0", "i2")) in red(report)
    assert ("failure policy", ("i2",)) in red(report)
    assert not any(server.pinned for server in servers)


async def test_a_server_that_is_away_does_not_stop_the_check(fleet: StartFleet) -> None:
    servers = await fleet(Fault(), Fault(), Fault())
    await servers[1].stop()
    report = await check(servers)
    assert ("reachable", ("i1",)) in red(report)
    assert {each.where for each in report.findings if each.probe == "flip without restart"} == {("i0", "i2")}


async def test_one_server_alone_has_nobody_to_hand_over_to(fleet: StartFleet) -> None:
    report = await check(await fleet(Fault()))
    assert "one server" in told(report, "KV pull")
    assert not red(report)


async def test_an_slo_that_an_idle_server_misses_is_red(fleet: StartFleet) -> None:
    report = await check(await fleet(Fault(), Fault()), slo=Slo(1e-6, 1.0))
    assert red(report) == [("SLO", ("i0",)), ("SLO", ("i1",))]


async def test_a_check_that_is_cancelled_lets_go_of_what_it_pinned(fleet: StartFleet) -> None:
    servers = await fleet(Fault(), Fault(), Fault())
    settings = CheckSettings(tuple((each.url, None) for each in servers))
    reached = asyncio.Event()

    def advance(share: float, what: str) -> None:
        if "dead" in what:
            reached.set()

    running = asyncio.create_task(check_fleet(settings, advance, deadlines=QUICK))
    await reached.wait()
    assert all(server.pinned for server in servers)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not any(server.pinned for server in servers)


async def test_the_verb_prints_a_table_or_json_and_says_by_its_status(
    fleet: StartFleet, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    servers = await fleet(Fault(), Fault(), Fault(recompute=True))
    words = ["check", *(word for each in servers for word in ("--vllm", each.url + "/v1"))]

    async def status(*more: str) -> object:
        with pytest.raises(SystemExit) as caught:
            await asyncio.to_thread(main, [*words, *more])
        return caught.value.code

    assert await status() == 1
    table = capsys.readouterr().out
    assert "6 pairs" in table and "not ready: 1 to change" in table
    assert servers[2].url in table
    assert await status("--json") == 1
    answer = json.loads(capsys.readouterr().out)
    found = [each for each in answer["findings"] if each["verdict"] == "red"]
    assert [(each["probe"], each["where"]) for each in found] == [("failure policy", ["i2"])]
    del words[-2:]
    assert await status("--json") == 0


def test_the_verb_refuses_what_it_cannot_check(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["check"],
        ["check", "--vllm", "http://h:1", "--vllm", "http://h:1/"],
        ["check", "--vllm", "h"],
    ):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 2, capsys.readouterr().err
