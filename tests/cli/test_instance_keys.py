"""``profile`` and ``check`` know the keys of the instances that a gateway of the same user started."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.fleet.fleet_observing import Recorder
from tidegate.cli.instance_keys import KeyFile, shared_key
from tidegate.cli.launch import AnnouncedFleet
from tidegate.cli.main import build_app
from tidegate.fleet.emulated import EmulatedFleet, EmulatedLaunch


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "tidegate" / "instances"


async def test_emulated_instances_can_be_checked_and_profiled(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDEGATE_API_KEY", "the gateway's own")
    fleet = AnnouncedFleet(EmulatedFleet(EmulatedLaunch(("h100_sxm/llama-3.1-8b:2",))))
    seen = Recorder()
    try:
        await fleet.start(seen)
        (file,) = state.iterdir()
        assert file.stat().st_mode & 0o777 == 0o600
        urls = [member.url for member in seen.up.values()]

        def run(*words: str) -> tuple[int, str]:
            result = CliRunner().invoke(build_app(words), words)
            return result.exit_code, result.output + str(result.exception or "")

        check = await asyncio.to_thread(run, "check", "--vllm", urls[0], "--url", f"{urls[1]}/v1", "--json")
        assert check[0] == 0, check[1]
        assert "a protocol of their own" in check[1]
        profile = await asyncio.to_thread(run, "profile", "--url", urls[0], "--budget", "3", "--json")
        assert profile[0] == 0 or "give a larger --budget" in profile[1], profile[1]
    finally:
        await fleet.stop()
    assert not list(state.iterdir())


def test_only_instances_of_one_living_gateway_have_a_key(state: Path) -> None:
    state.mkdir(parents=True)
    keys = '{"http://127.0.0.1:1": ["a", "s"], "http://127.0.0.1:2": ["a", "s"]}'
    file = state / f"{os.getpid()}.json"
    file.write_text(keys)
    assert shared_key(["http://127.0.0.1:1/", "http://127.0.0.1:2/v1"]) == ("a", "s")
    assert shared_key(["http://127.0.0.1:1", "http://127.0.0.1:9"]) is None, "a key goes to nobody else"
    assert shared_key(["http://127.0.0.1:9"]) is None
    dead = state / f"{2**22 + 7}.json"
    file.rename(dead)
    assert shared_key(["http://127.0.0.1:1"]) is None and not dead.exists()
    (state / f"{os.getpid()}.json").write_text("half a li")
    assert shared_key(["http://127.0.0.1:1"]) is None


def test_where_nothing_can_be_written_the_gateway_serves_all_the_same(state: Path) -> None:
    state.parent.write_text("a file in the way")
    KeyFile().remove()
    assert shared_key(["http://127.0.0.1:1"]) is None
