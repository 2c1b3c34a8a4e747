"""Promises of LaunchedVllmFleet, with a stand-in for vLLM: servers come up with what they need, come back,
and leave no process behind, however they or the gateway end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.fleet.fleet_observing import Recorder, alive, until
from tidegate.core.errors import ConfigError, FleetFull, SetupError
from tidegate.costs.library import packaged_profile
from tidegate.costs.profile import Profile
from tidegate.fleet.health import HealthPace
from tidegate.fleet.launched_vllm import (
    LaunchedVllmFleet,
    VllmLaunch,
    cpu_memory,
    hardware,
    share_out,
    visible_gpus,
)
from tidegate.fleet.member import Member
from tidegate.fleet.step_choice import choose_step
from tidegate.fleet.supervision import FleetPace
from tidegate.fleet.vllm import ServeArguments
from tidegate.policies.chunks import budget_for

QUICK = FleetPace(health=HealthPace(every_s=600.0), ready_s=20.0, grace_s=1.0, backoff_s=0.05)
Make = Callable[..., LaunchedVllmFleet]


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VllmLaunch:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    program = tmp_path / "vllm"
    fake = Path(__file__).parent / "fake_vllm.py"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {fake} "$@"\n')
    program.chmod(0o755)
    return VllmLaunch(tmp_path / "tiny", program, tmp_path / "logs", 1)


@pytest.fixture
async def make(launch: VllmLaunch) -> AsyncIterator[Make]:
    """Build fleets of fake servers; whatever a test leaves running is stopped after it."""
    made: list[LaunchedVllmFleet] = []

    def build(pace: FleetPace = QUICK, profiles: Sequence[Profile] = (), **changes: Any) -> LaunchedVllmFleet:
        made.append(LaunchedVllmFleet(replace(launch, **changes), profiles=profiles, pace=pace))
        return made[-1]

    yield build
    for fleet in made:
        await fleet.stop()


async def seen_by(member: Member) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session, session.get(f"{member.url}/seen") as response:
        seen: dict[str, Any] = await response.json(content_type=None)
        return seen


async def test_servers_come_up_as_members_that_hand_kv_to_each_other(make: Make) -> None:
    recorder = Recorder()
    arguments = ServeArguments(["--max-num-seqs", "8"])
    await make(instances=2, arguments=arguments).start(recorder)
    seen = [await seen_by(recorder.up[name]) for name in ("i0", "i1")]
    for name, one in zip(("i0", "i1"), seen, strict=True):
        member, argv = recorder.up[name], one["argv"]
        config = json.loads(argv[argv.index("--kv-transfer-config") + 1])
        assert config["engine_id"] == member.engine_id, "handles name their owner by it"
        assert (config["kv_role"], config["kv_load_failure_policy"]) == ("kv_both", "fail")
        assert "--kv-cache-memory-bytes" in argv, "or the first would take nearly all memory"
        assert argv[0] == "serve" and argv[-2:] == ["--max-num-seqs", "8"]
        assert (member.kind, member.connector, member.model) == ("vllm", "nixl", "tiny")
        assert member.capabilities.kv_transfer and member.instance.extends_kv
        assert (member.instance.kv_capacity_tokens, member.instance.block_tokens) == (3200, 32)
        assert one["environment"]["VLLM_API_KEY"] == member.api_key and len(member.api_key) == 64
        assert member.pid is not None and alive(member.pid)
    ports = {one["environment"]["VLLM_NIXL_SIDE_CHANNEL_PORT"] for one in seen}
    assert len(ports) == 2, "a side channel each"


PROFILE = packaged_profile("h100_sxm/llama-3.1-8b").profile
STEP = "--max-num-batched-tokens"


async def test_servers_are_told_the_step_that_keeps_the_target(
    make: Make, launch: VllmLaunch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    recorder = Recorder()
    slower = PROFILE.scaled(2.0, 2.0)
    fleet = make(instances=2, tpot_s=0.05, profiles=(PROFILE, slower))
    await fleet.start(recorder)
    words = [(await seen_by(recorder.up[name]))["argv"] for name in ("i0", "i1")]
    told = [int(argv[argv.index(STEP) + 1]) for argv in words]
    assert told == [budget_for(each.mixed, 0.05).tokens for each in (PROFILE, slower)] and told[0] > told[1]
    assert told == [recorder.up[name].instance.step_tokens for name in ("i0", "i1")]


async def test_the_users_step_wins(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    recorder = Recorder()
    own = ServeArguments(["--max_num_batched_tokens=4k"])
    fleet = make(instances=1, tpot_s=0.05, profiles=(PROFILE,), arguments=own)
    await fleet.start(recorder)
    argv = (await seen_by(recorder.up["i0"]))["argv"]
    assert STEP not in argv and argv[-1] == "--max_num_batched_tokens=4k"
    assert recorder.up["i0"].instance.step_tokens == 4000


@pytest.mark.parametrize(
    ("words", "profile", "on_gpus", "tokens", "why"),
    [
        ("", PROFILE, True, 1280, "a step of 50 ms at most by h100_sxm/llama-3.1-8b with 197"),
        ("", None, True, 0, "no --profile"),
        ("", PROFILE, False, 0, "on CPUs"),
        ("--config vllm.yaml", PROFILE, True, 0, "a file of vLLM arguments"),
        ("--no_enable_chunked_prefill", PROFILE, True, 0, "whole prompts"),
        ("--max-num-seqs 2048", PROFILE, True, 2048, "the least that --max-num-seqs allows"),
        ("--max-num-batched-tokens 2K", None, False, 2048, "as the vLLM arguments say"),
        ("", PROFILE.scaled(9.0, 9.0), True, 128, "the least, which takes more than 50 ms"),
    ],
)
def test_a_step_is_chosen_where_nothing_speaks_against_it(
    words: str, profile: Profile | None, on_gpus: bool, tokens: int, why: str
) -> None:
    step = choose_step(ServeArguments(words.split()), profile, 0.05, on_gpus=on_gpus)
    assert step.tokens == tokens and why in step.reason
    assert ("default" in str(step)) is (tokens == 0)


async def test_the_output_goes_to_a_log_and_the_gateways_keys_stay_with_it(
    make: Make, launch: VllmLaunch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDEGATE_API_KEY", "sk-front-door")
    recorder = Recorder()
    await make().start(recorder)
    assert "loading the weights" in (launch.logs / "i0.log").read_text()
    assert "sk-front-door" not in json.dumps(await seen_by(recorder.up["i0"]))
    assert recorder.up["i0"].api_key not in " ".join((await seen_by(recorder.up["i0"]))["argv"])


async def test_a_killed_server_leaves_no_process_and_comes_back_as_another_engine(make: Make) -> None:
    recorder = Recorder()
    await make().start(recorder)
    first = recorder.up["i0"]
    core = (await seen_by(first))["child"]
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    await until(lambda: recorder.reports == [("up", "i0"), ("down", "i0"), ("up", "i0")])
    assert not alive(core), "it held the GPU's memory"
    assert recorder.up["i0"].engine_id != first.engine_id
    assert recorder.up["i0"].url != first.url


async def test_an_added_server_is_like_the_others_and_a_removed_one_leaves_no_process(
    make: Make, launch: VllmLaunch
) -> None:
    recorder = Recorder()
    fleet = make(instances=1, arguments=ServeArguments(["--max-num-seqs", "8"]))
    await fleet.start(recorder)
    assert fleet.add()
    await until(lambda: "i1" in recorder.up)
    first, added = [await seen_by(recorder.up[name]) for name in ("i0", "i1")]
    assert added["argv"][-2:] == ["--max-num-seqs", "8"]
    memory = [one["argv"][one["argv"].index("--kv-cache-memory-bytes") + 1] for one in (first, added)]
    assert memory[0] == memory[1]
    assert recorder.up["i1"].api_key == recorder.up["i0"].api_key
    assert (launch.logs / "i1.log").exists()
    assert fleet.remove("i0", "drained")
    await until(lambda: recorder.reports[2:] == [("down", "i0")])
    await until(lambda: not alive(first["child"]))
    assert alive(added["child"])


def test_a_range_of_servers_has_gpus_or_memory_for_the_most_of_them(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    with pytest.raises(SetupError, match="4 instances with 1 GPU each need 4, and 3 can be seen"):
        make(instances=1, most=4)
    assert len(make(instances=1, most=3)._shares) == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    shared = make(instances=1, most=4)
    assert shared._memory == cpu_memory(4) and shared.count == 0


async def test_an_added_server_takes_gpus_that_nobody_has(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    recorder = Recorder()
    fleet = make(instances=1, arguments=ServeArguments(["-tp", "2"]))
    await fleet.start(recorder)
    assert fleet.add()
    with pytest.raises(FleetFull, match=r"no . GPUs are free"):
        fleet.add()  # one GPU is left, and a server takes two
    await until(lambda: "i1" in recorder.up)
    gpus = [
        (await seen_by(recorder.up[name]))["environment"]["CUDA_VISIBLE_DEVICES"] for name in ("i0", "i1")
    ]
    assert gpus == ["0,1", "2,3"]
    assert fleet.remove("i0", "drained")
    with pytest.raises(FleetFull, match=r"no . GPUs are free"):
        fleet.add()  # its GPUs are taken until its process has ended
    await until(lambda: "i0" not in fleet._slots)
    fleet.add()
    await until(lambda: len(recorder.up) == 2)
    (name,) = set(recorder.up) - {"i1"}
    assert (await seen_by(recorder.up[name]))["environment"]["CUDA_VISIBLE_DEVICES"] == "0,1"


@pytest.mark.parametrize("mode", ["serve", "stubborn"])
async def test_stopping_the_fleet_stops_all_processes(
    make: Make, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("FAKE_VLLM", mode)
    recorder = Recorder()
    fleet = make()
    await fleet.start(recorder)
    member = recorder.up["i0"]
    core = (await seen_by(member))["child"]
    await fleet.stop()
    assert member.pid is not None and not alive(member.pid) and not alive(core)


async def test_a_server_that_hangs_is_killed_with_all_its_processes(make: Make) -> None:
    recorder = Recorder()
    await make(FleetPace(health=HealthPace(every_s=0.1, deadline_s=0.3), backoff_s=0.05)).start(recorder)
    hung = recorder.up["i0"]
    core = (await seen_by(hung))["child"]
    assert hung.pid is not None
    os.kill(hung.pid, signal.SIGSTOP)
    await until(lambda: len(recorder.reports) == 3)
    assert not alive(hung.pid) and not alive(core)


async def test_servers_end_when_the_gateway_is_killed(launch: VllmLaunch) -> None:
    gateway = textwrap.dedent(f"""
        import asyncio
        from pathlib import Path
        from tidegate.fleet.launched_vllm import LaunchedVllmFleet, VllmLaunch
        class Tell:
            def member_up(self, member): print(member.pid, member.url, flush=True)
            def member_down(self, *_): pass
        async def main():
            launch = VllmLaunch(*map(Path, {[str(launch.model), str(launch.program), str(launch.logs)]!r}), 1)
            await LaunchedVllmFleet(launch).start(Tell())
            await asyncio.Event().wait()
        asyncio.run(main())
    """)
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", gateway, stdout=subprocess.PIPE)
    assert process.stdout is not None
    pid, url = (await process.stdout.readline()).decode().split()
    async with aiohttp.ClientSession() as session, session.get(f"{url}/seen") as response:
        core = json.loads(await response.text())["child"]
    process.kill()
    await process.wait()
    await until(lambda: not alive(int(pid)) and not alive(core))


async def test_a_failed_start_shows_the_cause_and_where_the_log_is(
    make: Make, launch: VllmLaunch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "crash")
    with pytest.raises(SetupError) as caught:
        await make().start(Recorder())
    message = caught.value.message
    assert "exited with status 1" in message
    assert "ValueError: no room for the KV cache" in message and "RuntimeError: engine core failed" in message
    assert str(launch.logs / "i0.log") in message


async def test_a_server_that_never_gets_healthy_fails_the_start(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "slow")
    with pytest.raises(SetupError, match=r"was not ready within 1 s"):
        await make(replace(QUICK, ready_s=1.0)).start(Recorder())


def test_each_instance_gets_gpus_of_its_own(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert visible_gpus({}, tmp_path) == ["0", "1", "2", "3"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "5, 3"}, tmp_path) == ["5", "3"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == []
    assert share_out(["0", "1", "2", "3"], 2, 2) == ["0,1", "2,3"]
    with pytest.raises(SetupError, match="3 instances with 2 GPUs each need 6, and 4 can be seen"):
        share_out(["0", "1", "2", "3"], 3, 2)
    assert hardware({"CUDA_VISIBLE_DEVICES": "4,5"}, 2, 1) == [
        {"CUDA_VISIBLE_DEVICES": "4"},
        {"CUDA_VISIBLE_DEVICES": "5"},
    ]


def test_without_gpus_servers_share_the_cores_unless_told_how() -> None:
    told = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "7"}
    assert hardware(told, 2, 1) == [{"VLLM_CPU_OMP_THREADS_BIND": "nobind"}] * 2


def test_arguments_tell_how_many_gpus_and_how_kv_moves() -> None:
    assert ServeArguments(["--tensor_parallel_size=2", "-pp", "2"]).gpus == 4
    config = {"kv_connector": "NixlConnector", "kv_connector_extra_config": {"kv_lease_duration": 60}}
    nixl = ServeArguments(["--kv-transfer-config", json.dumps(config), "--seed", "1"])
    assert (nixl.kv_transfer.connector, nixl.kv_transfer.lease_s) == ("nixl", 60.0)
    assert not nixl.kv_transfer.bidirectional, "as the configuration given says"
    line = nixl.command_line("i0-1")
    assert line.count("--kv-transfer-config") == 1
    assert json.loads(line[line.index("--kv-transfer-config") + 1]) == {**config, "engine_id": "i0-1"}
    unknown = ServeArguments(["--kv-transfer-config", '{"kv_connector": "LMCacheConnectorV1"}'])
    assert unknown.kv_transfer.connector == "none"
    for words in (
        ["--kv-transfer-config", "nixl"],
        ["-tp", "two"],
        ["-tp", "²"],
        ["-tp", "00"],
        ["--port=1"],
    ):
        with pytest.raises(ConfigError):
            ServeArguments(words)


@pytest.mark.parametrize(
    "lease", ['"soon"', '"60"', "null", "true", "[30]", "0", "-1", "NaN", "Infinity", "1" + 400 * "0"]
)
def test_a_lease_that_is_no_time_is_a_wrong_setting(lease: str) -> None:
    config = (
        f'{{"kv_connector": "NixlConnector", "kv_connector_extra_config": {{"kv_lease_duration": {lease}}}}}'
    )
    with pytest.raises(ConfigError, match="kv_lease_duration"):
        ServeArguments(["--kv-transfer-config", config])


@pytest.mark.parametrize(
    "config", ["[]", "{}", '{"kv_connector": ["Nixl"]}', '{"kv_connector": null}',
               '{"kv_connector": "NixlConnector", "kv_connector_extra_config": [1]}']
)  # fmt: skip
def test_a_configuration_of_another_form_is_a_wrong_setting(config: str) -> None:
    with pytest.raises(ConfigError, match="expected JSON with a kv_connector"):
        ServeArguments(["--kv-transfer-config", config])
