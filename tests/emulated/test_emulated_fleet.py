"""The real gateway in front of a process of emulated instances."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cli.test_profile_files import SAVED
from tests.emulated.emulated_gateway import gateway, stream
from tidegate.core.errors import ConfigError
from tidegate.costs.saved_profile import save_profile
from tidegate.engines.emulated.vocabulary import answer
from tidegate.fleet.emulated import EmulatedFleet, EmulatedLaunch
from tidegate_testing.chaos import Forced

SECONDS_OF_STAGE = re.compile(r'^tidegate_stage_seconds_sum\{stage="(\w+)"\} (\S+)$', re.MULTILINE)


async def test_flips_and_hand_overs_change_no_token() -> None:
    prompts = [list(range(start, start + 50 + 7 * start)) for start in range(24)]
    async with gateway("arrow-lending", forced=Forced(flip_every_s=0.02)) as (running, url, client):
        got = await asyncio.gather(*(stream(client, url, prompt, 40) for prompt in prompts))
        assert got == [answer(prompt, 0, 40) for prompt in prompts]
        assert running.dispatcher.flips > 0


async def test_the_death_of_the_process_changes_no_token() -> None:
    prompts = [list(range(start, start + 60)) for start in range(12)]
    async with gateway("static") as (running, url, client):
        streams = [asyncio.create_task(stream(client, url, prompt, 600)) for prompt in prompts]
        async with asyncio.timeout(30):
            # One that has no token yet is refused while nothing is up, and may be sent again.
            while int(
                running.dispatcher.plane.snapshot(running.dispatcher.clock.now()).decode_requests.sum()
            ) < len(prompts):
                await asyncio.sleep(0.01)
        pids = {upstream.member.pid for upstream in running.dispatcher.upstreams.values()}
        assert len(pids) == 1
        os.kill(pids.pop() or 0, signal.SIGKILL)
        got = await asyncio.gather(*streams)
        assert got == [answer(prompt, 0, 600) for prompt in prompts]


async def test_a_measured_engine_is_emulated_at_its_own_pace(tmp_path: Path) -> None:
    slow = SAVED.profile.scaled(20.0, 20.0)
    save_profile(file := tmp_path / "slow.json", replace(SAVED, profile=slow))
    async with gateway("colocated", launch=EmulatedLaunch((f"{file}:1",))) as (running, url, client):
        assert len(await stream(client, url, list(range(60)), 2)) == 2
        text = running.dispatcher.metrics.render().decode()
    stages = {name: float(seconds) for name, seconds in SECONDS_OF_STAGE.findall(text)}
    assert stages["prefill"] == pytest.approx(slow.prefill_s(60), rel=1e-3)


def test_unknown_profiles_and_mixed_models_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"near: h100_sxm/llama-3\.1-8b"):
        EmulatedFleet(EmulatedLaunch(("h100_sxm/lama-3.1-8b:2",)))
    with pytest.raises(ConfigError, match="one model"):
        EmulatedFleet(EmulatedLaunch(("h100_sxm/llama-3.1-8b:2", "h100_sxm/qwen3-32b/tp2:1")))


def test_the_command_serves_without_extras_and_leaves_nothing_behind() -> None:
    blocked = "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'tokenizers']))"
    run = f"{blocked}; from tidegate.cli.main import main; main()"
    words = ["serve", "--emulate", "l40s/llama-3.1-8b:2", "--emulate", "a100_sxm/llama-3.1-8b", "--port", "0"]
    served = subprocess.Popen([sys.executable, "-c", run, *words], stdout=subprocess.PIPE, text=True)
    try:
        assert served.stdout is not None
        said = []
        for line in served.stdout:
            said.append(line)
            if line.startswith("serving on"):
                break
        assert [line.split()[0] for line in said if " up after " in line] == ["i0", "i1", "i2"]
        children = subprocess.run(
            ["pgrep", "-P", str(served.pid)], capture_output=True, text=True, check=True
        ).stdout.split()
        assert len(children) == 1
        served.kill()
        served.wait(10)
        asyncio.run(_gone(int(children[0])))
    finally:
        served.kill()
        served.wait()
        if served.stdout is not None:
            served.stdout.close()


async def _gone(pid: int) -> None:
    async with asyncio.timeout(10):
        while "zombie" not in _state(pid):
            await asyncio.sleep(0.02)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "zombie"
