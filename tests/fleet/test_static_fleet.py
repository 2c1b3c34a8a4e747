"""Promises of StaticFleet: it finds out what servers are, and notices when they go and come."""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.fleet.fleet_observing import Recorder, until
from tidegate.core.errors import ConfigError, SetupError
from tidegate.costs.library import packaged_profile
from tidegate.engines.vllm.client import VllmClient
from tidegate.fleet.health import HealthPace, until_unhealthy
from tidegate.fleet.static import StaticFleet, StaticPace, checked_url
from tidegate.fleet.vllm import KvSetup

QUICK = StaticPace(health=HealthPace(every_s=0.05, deadline_s=0.3), start_s=10.0, retry_s=0.05)
CACHE = 'vllm:cache_config_info{block_size="32",cache_dtype="auto",engine="0",num_gpu_blocks="100"} 1.0\n'


class Server:
    """A server that answers like vLLM; ``port`` stays the same over restarts."""

    def __init__(self) -> None:
        self.port = 0
        self.status = 200
        self.models: object = {"data": [{"id": "m", "max_model_len": 1024}]}
        self.metrics = f"# TYPE vllm:cache_config_info gauge\n{CACHE}"
        self.key = ""
        self.bootstrap: object = {}
        self.hanging = False
        self.listed = 0
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def up(self) -> None:
        app = web.Application()
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/v1/models", self._list),
                web.get("/metrics", self._metrics),
                web.get("/query", self._query),
            ]
        )
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True).start()
        self.port = self._runner.addresses[0][1]

    async def down(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _health(self, _: web.Request) -> web.Response:
        if self.hanging:
            await asyncio.Event().wait()
        return web.Response(status=self.status)

    async def _list(self, request: web.Request) -> web.Response:
        self.listed += 1
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.Response(status=401)
        return web.json_response(self.models)

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(text=self.metrics) if self.metrics else web.Response(status=404)

    async def _query(self, _: web.Request) -> web.Response:
        return web.json_response(self.bootstrap)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    await server.up()
    yield server
    await server.down()


async def test_a_server_is_described_by_what_it_says(server: Server) -> None:
    seen = Recorder()
    fleet = StaticFleet([server.url + "/v1/"], pace=QUICK)
    await fleet.start(seen)
    await fleet.stop()
    member = seen.up["i0"]
    assert (member.kind, member.url, member.model) == ("vllm", server.url, "m")
    assert member.instance.block_tokens == 32
    assert member.instance.kv_capacity_tokens == 3200
    assert member.instance.max_model_len == 1024
    assert member.profile is None
    assert not member.capabilities.kv_transfer and not member.capabilities.continues


def registered(*engine_ids: str) -> dict[str, Any]:
    """Return what a Mooncake bootstrap server says: engines by data-parallel rank."""
    worker = {"0": {"0": "tcp://127.0.0.1:5"}}
    return {str(rank): {"engine_id": name, "worker_addr": worker} for rank, name in enumerate(engine_ids)}


async def test_a_mooncake_member_has_the_name_its_peers_call_it_by(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    seen = Recorder()
    kv = KvSetup("mooncake", bidirectional=True, bootstraps=[server.url])
    fleet = StaticFleet([server.url], pace=QUICK, kv=kv)
    starting = asyncio.create_task(fleet.start(seen))
    await until(lambda: "no engine yet" in caplog.text)
    server.bootstrap = registered("eng-7")
    await starting
    await fleet.stop()
    member = seen.up["i0"]
    assert (member.connector, member.bootstrap_url, member.kv_engine_id) == ("mooncake", server.url, "eng-7")
    assert member.capabilities.kv_transfer and not member.instance.extends_kv
    assert member.lease_s == 480.0


async def test_mooncake_engines_behind_one_url_are_refused(server: Server) -> None:
    server.bootstrap = registered("eng_dp0", "eng_dp1")
    fleet = StaticFleet([server.url], pace=QUICK, kv=KvSetup("mooncake", bootstraps=[server.url]))
    with pytest.raises(SetupError, match="data-parallel"):
        await fleet.start(Recorder())


async def test_a_server_that_only_takes_kv_needs_no_bootstrap(server: Server) -> None:
    seen = Recorder()
    kv = KvSetup("mooncake", bootstraps=["http://127.0.0.1:9"])
    fleet = StaticFleet([f"decode={server.url}"], pace=QUICK, kv=kv)
    await fleet.start(seen)
    await fleet.stop()
    assert seen.up["i0"].consumes_kv and not seen.up["i0"].produces_kv


async def test_without_metrics_the_capacity_is_what_vllm_guarantees(server: Server) -> None:
    server.metrics = ""
    seen = Recorder()
    fleet = StaticFleet([server.url], pace=QUICK)
    await fleet.start(seen)
    await fleet.stop()
    assert seen.up["i0"].instance.kv_capacity_tokens == 1024


async def test_members_carry_the_profiles_that_were_given(server: Server) -> None:
    twin = Server()
    await twin.up()
    ours, theirs = (packaged_profile(f"{gpu}/llama-3.1-8b").profile for gpu in ("h100_sxm", "rtx_4090"))
    try:
        for given, expected in (
            ((ours, theirs), (ours, theirs)),
            ((ours,), (ours, ours)),
            ((), (None, None)),
        ):
            seen = Recorder()
            fleet = StaticFleet([server.url, twin.url], profiles=given, pace=QUICK)
            await fleet.start(seen)
            await fleet.stop()
            assert (seen.up["i0"].profile, seen.up["i1"].profile) == expected
    finally:
        await twin.down()


async def test_a_server_that_comes_later_is_waited_for(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await server.down()
    seen = Recorder()
    fleet = StaticFleet([server.url], pace=QUICK)
    starting = asyncio.create_task(fleet.start(seen))
    await until(lambda: "refuses connections" in caplog.text)
    await server.up()
    await starting
    await fleet.stop()
    assert seen.reports == [("up", "i0")]


async def test_a_restart_shows_as_down_then_up_with_a_new_engine_id(server: Server) -> None:
    seen = Recorder()
    fleet = StaticFleet([server.url], pace=QUICK)
    await fleet.start(seen)
    await server.down()
    await until(lambda: not seen.up)
    await server.up()
    await until(lambda: bool(seen.up))
    await fleet.stop()
    assert seen.reports == [("up", "i0"), ("down", "i0"), ("up", "i0")]
    assert seen.ups[0].engine_id != seen.ups[1].engine_id


@pytest.mark.parametrize("fault", ["hang", "unhealthy"])
async def test_missed_checks_mean_down_and_recovery_means_up(server: Server, fault: str) -> None:
    seen = Recorder()
    fleet = StaticFleet([server.url], pace=QUICK)
    await fleet.start(seen)
    server.hanging = fault == "hang"
    server.status = 503 if fault == "unhealthy" else 200
    await until(lambda: not seen.up)
    server.hanging, server.status = False, 200
    await until(lambda: bool(seen.up))
    await fleet.stop()


async def test_a_suspected_dead_server_is_down_without_waiting_for_the_next_check(server: Server) -> None:
    seen = Recorder()
    fleet = StaticFleet([server.url], pace=StaticPace(HealthPace(every_s=600.0), retry_s=0.05))
    await fleet.start(seen)
    await server.down()
    fleet.suspect("i0")
    await until(lambda: not seen.up)
    await fleet.stop()


async def test_no_server_at_all_is_an_error_that_names_each() -> None:
    pace = StaticPace(start_s=0.2, retry_s=0.05)
    with pytest.raises(
        SetupError, match=r"(?s)no server answers.*i0 http://127.0.0.1:9: refuses connections"
    ):
        await StaticFleet(["http://127.0.0.1:9"], pace=pace).start(Recorder())


async def test_a_server_that_wants_a_key_fails_at_once_and_works_with_it(server: Server) -> None:
    server.key = "sk-engine"
    patient = StaticPace(start_s=600.0)
    with pytest.raises(SetupError, match="TIDEGATE_VLLM_API_KEY"):
        await StaticFleet([server.url], pace=patient).start(Recorder())
    seen = Recorder()
    fleet = StaticFleet([server.url], api_key="sk-engine", pace=patient)
    await fleet.start(seen)
    await fleet.stop()
    assert seen.up["i0"].api_key == "sk-engine"


@pytest.mark.parametrize(
    "models", [{"data": []}, {"data": [{"id": "m"}]}, [], {"data": [{"id": "m", "max_model_len": "x"}]}]
)
async def test_a_model_list_that_cannot_be_used_fails_at_once(server: Server, models: object) -> None:
    server.models = models
    with pytest.raises(SetupError, match="/v1/models"):
        await StaticFleet([server.url], pace=StaticPace(start_s=600.0)).start(Recorder())


async def test_one_server_is_enough_to_start(server: Server) -> None:
    seen = Recorder()
    pace = StaticPace(QUICK.health, start_s=0.5, retry_s=0.05)
    fleet = StaticFleet(["http://127.0.0.1:9", server.url], pace=pace)
    await fleet.start(seen)
    await fleet.stop()
    assert list(seen.up) == ["i1"]


@pytest.fixture
async def other(server: Server) -> AsyncIterator[Server]:
    """A second server, which serves another model."""
    other = Server()
    other.models = {"data": [{"id": "n", "max_model_len": 1024}]}
    await other.up()
    yield other
    await other.down()


async def test_another_model_at_start_is_an_error_that_names_both(server: Server, other: Server) -> None:
    fleet = StaticFleet([server.url, other.url], pace=StaticPace(start_s=600.0))
    with pytest.raises(SetupError, match=r"(?s)do not serve one model.*it serves '[mn]', the fleet '[mn]'"):
        await fleet.start(Recorder())


async def test_a_server_that_comes_back_with_another_model_is_refused_until_it_has_the_right_one(
    server: Server, other: Server, caplog: pytest.LogCaptureFixture
) -> None:
    wrong, other.models = other.models, server.models
    seen = Recorder()
    fleet = StaticFleet([server.url, other.url], pace=QUICK)
    await fleet.start(seen)
    await other.down()
    await until(lambda: "i1" not in seen.up)
    other.models = wrong
    await other.up()
    await until(lambda: "serves 'n'" in caplog.text)
    listed = other.listed
    await until(lambda: other.listed > listed + 2)
    assert list(seen.up) == ["i0"]
    assert sum("serves 'n'" in record.getMessage() for record in caplog.records) == 1
    other.models = server.models
    await until(lambda: "i1" in seen.up)
    await fleet.stop()


async def test_following_a_server_survives_what_nobody_expected(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(VllmClient, "facts", fails_once(VllmClient.facts))
    monkeypatch.setattr("tidegate.fleet.static.until_unhealthy", fails_once(until_unhealthy))
    seen = Recorder()
    fleet = StaticFleet([server.url], pace=QUICK)
    await fleet.start(seen)
    await until(lambda: len(seen.reports) == 3)
    await fleet.stop()
    assert seen.reports == [("up", "i0"), ("down", "i0"), ("up", "i0")]
    assert "following i0 failed" in caplog.text and "checking i0 failed" in caplog.text


def fails_once(real: Callable[..., Any]) -> Callable[..., Any]:
    failed = False

    async def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal failed
        if not failed:
            failed = True
            raise ZeroDivisionError
        return await real(*args, **kwargs)

    return call


async def test_a_session_is_not_left_open(server: Server) -> None:
    fleet = StaticFleet([server.url], pace=QUICK)
    await fleet.start(Recorder())
    await fleet.stop()
    await fleet.stop()
    assert isinstance(fleet._session, aiohttp.ClientSession) and fleet._session.closed


def test_urls_are_checked() -> None:
    assert checked_url("http://h:1/v1/") == "http://h:1"
    with pytest.raises(ConfigError, match="plain http only"):
        checked_url("https://h:8000")
    for wrong in ("h:8000", "ftp://h", "http://", "http://h:99999", "http://h/?a=1"):
        with pytest.raises(ConfigError):
            checked_url(wrong)
    with pytest.raises(ConfigError, match="more than once"):
        StaticFleet(["http://h:1", "http://h:1/"])


async def test_servers_show_whether_kv_moves_between_them(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Server()
    await other.up()
    urls = [server.url, other.url]
    assert not await StaticFleet(urls, pace=QUICK).hands_on_kv()
    assert await StaticFleet([server.url, f"prefill={other.url}"], pace=QUICK).hands_on_kv()
    assert await StaticFleet(urls, kv=KvSetup("nixl"), pace=QUICK).hands_on_kv()
    assert not await StaticFleet(urls, kv=KvSetup("none"), pace=QUICK).hands_on_kv()
    other.metrics += "vllm:nixl_num_failed_transfers_total 0.0\n"
    assert await StaticFleet(urls, pace=QUICK).hands_on_kv()
    await other.down()
    monkeypatch.setattr("tidegate.fleet.static.ANSWER_S", 0.3)
    assert not await StaticFleet(urls, pace=QUICK).hands_on_kv()
    await server.down()
    assert await StaticFleet(urls, pace=QUICK).hands_on_kv(), "nobody answers: the start says so"


async def test_time_in_which_the_gateway_did_not_run_counts_against_no_server(server: Server) -> None:
    """The loop is blocked through every check while the server is well; then the server hangs."""
    pace = HealthPace(every_s=0.01, deadline_s=0.35, misses=1)
    suspicion, checks = asyncio.Event(), 0

    class Blocking(VllmClient):
        async def healthy(self) -> bool:
            nonlocal checks
            checks += 1
            if server.hanging:
                return await super().healthy()
            asyncio.get_running_loop().call_later(0.0, time.sleep, 0.8)
            return await super().healthy()

    async with aiohttp.ClientSession() as session:
        client = Blocking(session, server.url, deadline_s=pace.deadline_s)
        watch = asyncio.create_task(until_unhealthy(client, suspicion, pace, refused_is_gone=True))
        await until(lambda: checks > 2)
        assert not watch.done()
        server.hanging = True
        assert await watch == "does not answer health checks"


async def test_a_lack_of_descriptors_here_takes_no_server_down(server: Server) -> None:
    pace = HealthPace(every_s=0.01, deadline_s=1.0, misses=1)
    asked = 0

    class Counted(VllmClient):
        async def healthy(self) -> bool:
            nonlocal asked
            asked += 1
            return await super().healthy()

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
        watch = until_unhealthy(Counted(session, server.url), asyncio.Event(), pace, refused_is_gone=True)
        task = asyncio.create_task(watch)
        await until(lambda: asked > 1)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            before = asked
            await until(lambda: asked > before + 5)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert not task.done()
        await server.down()
        assert await task == "refuses connections"
