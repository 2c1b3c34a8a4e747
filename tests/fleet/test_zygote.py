"""Engines are forked from one process with torch imported: they come back fast, and do not depend on it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from tests.fleet.fleet_observing import Recorder, alive, until
from tidegate.engines.embedded.tiny_model import make_tiny_model
from tidegate.fleet.processes import EngineLaunch, LocalFleet
from tidegate.fleet.supervision import FleetPace

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pidfds are Linux's")
SMALL = {"hidden": 32, "heads": 2, "kv_heads": 1, "intermediate": 32}
START_S = 120.0


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[LocalFleet]:
    folder = make_tiny_model(tmp_path / "tiny", **SMALL)  # type: ignore[arg-type]
    fleet = LocalFleet(
        EngineLaunch(folder, 2, kv_memory_mb=4, zygote=True),
        pace=FleetPace(backoff_s=0.05, backoff_max_s=0.1),
    )
    yield fleet
    await fleet.stop()


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def pid_of(seen: Recorder, name: str) -> int:
    pid = seen.up[name].pid
    assert pid is not None
    return pid


async def test_engines_are_forked_come_back_and_outlive_the_zygote(fleet: LocalFleet) -> None:
    seen = Recorder()
    await fleet.start(seen)
    first = seen.up["i0"]
    assert fleet._zygote is not None
    zygote = fleet._zygote.pid
    assert zygote is not None
    assert parent(pid_of(seen, "i0")) == parent(pid_of(seen, "i1")) == zygote
    assert len(list(Path(f"/proc/{zygote}/task").iterdir())) == 1, (
        "a fork would lose the locks of other threads"
    )
    assert first.secret.encode() not in Path(f"/proc/{first.pid}/environ").read_bytes()

    os.kill(pid_of(seen, "i0"), signal.SIGKILL)
    await until(lambda: seen.reports[2:] == [("down", "i0"), ("up", "i0")], START_S)
    assert parent(pid_of(seen, "i0")) == zygote
    assert seen.up["i0"].profile == first.profile and first.profile is not None
    assert seen.up["i0"].engine_id != first.engine_id

    os.kill(zygote, signal.SIGKILL)
    await until(lambda: not alive(zygote))
    async with aiohttp.ClientSession() as session:
        for member in seen.up.values():
            async with session.get(f"{member.url}/health") as answer:
                assert answer.status == 200
    os.kill(pid_of(seen, "i1"), signal.SIGKILL)
    await until(lambda: seen.reports[4:] == [("down", "i1"), ("up", "i1")], START_S)
    assert parent(pid_of(seen, "i1")) == fleet._zygote.pid != zygote

    pids = [pid_of(seen, name) for name in seen.up]
    await fleet.stop()
    await until(lambda: not any(map(alive, pids)))


async def test_a_zygote_that_cannot_start_costs_only_time(
    fleet: LocalFleet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tidegate.fleet.zygote.COMMAND", (sys.executable, "-c", "raise SystemExit(7)"))
    seen = Recorder()
    await fleet.start(seen)
    assert sorted(seen.up) == ["i0", "i1"]
    assert parent(pid_of(seen, "i0")) == os.getpid()
    assert "i0 is started afresh: the process that forks engines" in caplog.text
