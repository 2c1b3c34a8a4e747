"""``tidegate check`` against real servers: a good fleet is green, and each planted fault is named."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pytest

from tests.vllm.vllm_servers import ServerOptions, Start, VllmCluster, VllmServer, nixl_variant
from tidegate.check.context import CheckSettings
from tidegate.check.run import check_fleet
from tidegate.check.verdict import CheckReport, CheckVerdict
from tidegate.core.slo import Slo

pytestmark = pytest.mark.parametrize("servers_of_arch", ["llama"], indirect=True)


@dataclass(frozen=True)
class Planted:
    """A fault of one server, i2 among three, and how the check has to name it."""

    options: ServerOptions
    probe: str
    words: str
    verdict: CheckVerdict = CheckVerdict.RED
    also: tuple[str, ...] = ()
    """Probes that the fault makes fail as well."""


FAULTS = {
    "wrong model": Planted(ServerOptions(arch="qwen3"), "same answers", "another model"),
    "other block size": Planted(ServerOptions(block_tokens=64), "block size", "64 tokens; the others: 32"),
    "recompute policy": Planted(
        ServerOptions(kv=nixl_variant(failure_policy="recompute")), "failure policy", "recompute"
    ),
    "no bidirectional reads": Planted(
        ServerOptions(kv=nixl_variant(bidirectional_kv_xfer=False)),
        "bidirectional reads",
        "bidirectional reads are missing",
    ),
    "blocked side channel": Planted(
        # Servers listen on an interface's name, but peers cannot connect to one.
        ServerOptions(env={"VLLM_NIXL_SIDE_CHANNEL_HOST": "lo"}),
        "side channel",
        "side channel blocked",
        also=("KV pull", "flip without restart"),
    ),
    "producer only": Planted(
        ServerOptions(kv=nixl_variant(role="kv_producer")), "role", "kv_producer", CheckVerdict.YELLOW
    ),
    "no prefix cache": Planted(
        ServerOptions(args=["--no-enable-prefix-caching"]), "prefix cache", "prefix cache off"
    ),
    "no KV transfer": Planted(ServerOptions(kv=None), "KV handle", "no KV transfer"),
}


def check(servers: Sequence[VllmServer], *, thorough: bool = False) -> CheckReport:
    settings = CheckSettings(
        tuple((each.url, None) for each in servers), slo=Slo(5.0, 0.5), thorough=thorough
    )
    return asyncio.run(check_fleet(settings, lambda share, what: None))


def not_green(report: CheckReport) -> str:
    """Return what a failed test shows of a report."""
    lines = [asdict(each) for each in report.findings if each.verdict is not CheckVerdict.GREEN]
    return "\n".join(
        f"{each['probe']} {each['where']} {each['verdict']}: {each['observed']}" for each in lines
    )


def reds(report: CheckReport) -> set[tuple[str, str]]:
    """Return the probes that failed, each with who is to blame: the last server where two are involved."""
    return {(each.probe, max(each.where)) for each in report.findings if each.verdict is CheckVerdict.RED}


def assert_nothing_is_left(servers: Sequence[VllmServer]) -> None:
    for server in servers:
        now = server.counters()
        assert (now.running, now.waiting, now.kv_cache_usage) == (0, 0, 0), server.name


def test_a_good_fleet_is_green_and_left_as_it_was(cluster: VllmCluster) -> None:
    report = check(cluster.servers)
    assert {each.verdict for each in report.findings} == {CheckVerdict.GREEN}, not_green(report)
    pulls = [each for each in report.findings if each.probe == "KV pull"]
    assert len(pulls) == 6 and all("112 tokens pulled" in each.observed for each in pulls)
    assert_nothing_is_left(cluster.servers)


@pytest.mark.parametrize("planted", FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_named(servers_of_arch: VllmCluster, start: Start, planted: Planted) -> None:
    good = servers_of_arch.servers[:2]
    servers_of_arch[2].stop()
    faulty = start([planted.options])[0]
    report = check([*good, faulty])
    found = [each for each in report.findings if each.probe == planted.probe and "i2" in each.where]
    assert any(each.verdict is planted.verdict and planted.words in each.observed for each in found), (
        not_green(report)
    )
    expected = {(planted.probe, "i2")} if planted.verdict is CheckVerdict.RED else set()
    assert reds(report) == expected | {(probe, "i2") for probe in planted.also}, not_green(report)
    assert report.ok is (planted.verdict is not CheckVerdict.RED)
    assert_nothing_is_left(good)
    if planted.probe != "side channel":
        assert_nothing_is_left([faulty])


def test_a_frozen_server_does_not_freeze_the_check(cluster: VllmCluster) -> None:
    cluster[2].freeze()
    try:
        report = check(cluster.servers)
    finally:
        cluster[2].thaw()
    assert reds(report) == {("reachable", "i2")}, not_green(report)
    assert {each.where for each in report.findings if each.probe == "flip without restart"} == {("i0", "i1")}


def test_leases_are_measured_when_there_is_time(cluster: VllmCluster) -> None:
    report = check(cluster.servers, thorough=True)
    leases = [each for each in report.findings if each.probe in ("lease", "read-back lease")]
    assert len(leases) == 6 and all("ended between" in each.observed for each in leases)
    assert report.ok, not_green(report)
    assert_nothing_is_left(cluster.servers)
