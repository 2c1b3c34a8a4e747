"""Promises of LocalFleet: engines come up, come back, and never outlive their fleet."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest

from tests.fleet.fleet_observing import Recorder, alive, until
from tidegate.core.errors import FleetFull, SetupError
from tidegate.engines.embedded.options import parse_options
from tidegate.fleet.health import HealthPace
from tidegate.fleet.processes import EngineLaunch, LocalFleet
from tidegate.fleet.supervision import FleetPace

FAKE = (sys.executable, str(Path(__file__).parent / "fake_engine.py"))
QUICK = FleetPace(
    health=HealthPace(every_s=0.1, deadline_s=0.3, misses=3),
    ready_s=20.0,
    grace_s=1.0,
    backoff_s=0.05,
    backoff_max_s=0.2,
)
Make = Callable[..., LocalFleet]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    """Build fleets of fake engines; whatever a test leaves running is stopped after it."""
    made: list[LocalFleet] = []

    def build(instances: int = 1, pace: FleetPace = QUICK, most: int | None = None) -> LocalFleet:
        launch = EngineLaunch(Path("models/fake"), instances, most, command=FAKE)
        made.append(LocalFleet(launch, pace=pace))
        return made[-1]

    yield build
    for fleet in made:
        await fleet.stop()


async def test_start_reports_every_engine_with_its_facts_and_profile(make: Make) -> None:
    seen = Recorder()
    await make(2).start(seen)
    assert sorted(seen.up) == ["i0", "i1"]
    member = seen.up["i0"]
    assert member.model == "fake"
    assert member.engine_id.startswith("i0-")
    assert member.instance.kv_capacity_tokens == 4096
    assert member.profile is not None
    assert member.profile.prefill_s(512) == pytest.approx(0.0612, rel=0.05)
    assert member.pid is not None and alive(member.pid)
    assert member.capabilities.kv_transfer and member.capabilities.continues


async def test_the_secret_travels_by_environment_only(make: Make) -> None:
    seen = Recorder()
    await make().start(seen)
    member = seen.up["i0"]
    async with aiohttp.ClientSession() as session, session.get(f"{member.url}/secret") as response:
        assert await response.text() == member.secret
    assert len(member.secret) == 64
    assert member.secret not in Path(f"/proc/{member.pid}/cmdline").read_text()
    assert member.secret not in repr(EngineLaunch(Path("m")).argv("i0"))


async def test_the_gateways_keys_are_withheld(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEGATE_API_KEY", "sk-front-door")
    seen = Recorder()
    await make().start(seen)
    assert "sk-front-door" not in Path(f"/proc/{seen.up['i0'].pid}/environ").read_text()


async def test_a_killed_engine_is_down_at_once_and_comes_back_with_a_new_engine_id(make: Make) -> None:
    seen = Recorder()
    slow_checks = FleetPace(health=HealthPace(every_s=600.0), backoff_s=0.05)
    await make(2, slow_checks).start(seen)
    first = seen.up["i1"]
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    await until(lambda: seen.reports[2:] == [("down", "i1"), ("up", "i1")])
    assert seen.up["i1"].engine_id != first.engine_id
    assert seen.up["i1"].pid != first.pid


@pytest.mark.parametrize("suspected", [False, True])
async def test_a_hung_engine_is_killed_and_restarted(make: Make, suspected: bool) -> None:
    seen = Recorder()
    every_s = 600.0 if suspected else 0.1
    fleet = make(1, FleetPace(health=HealthPace(every_s=every_s, deadline_s=0.2), backoff_s=0.05))
    await fleet.start(seen)
    hung = seen.up["i0"]
    assert hung.pid is not None
    async with aiohttp.ClientSession() as session, session.get(f"{hung.url}/hang"):
        pass
    if suspected:
        fleet.suspect("i0")
    await until(lambda: len(seen.reports) == 3)
    assert seen.reports == [("up", "i0"), ("down", "i0"), ("up", "i0")]
    assert not alive(hung.pid)


async def test_suspecting_a_healthy_engine_changes_nothing(make: Make) -> None:
    seen = Recorder()
    fleet = make(1, FleetPace(health=HealthPace(every_s=600.0)))
    await fleet.start(seen)
    fleet.suspect("i0")
    fleet.suspect("i7")
    slot = fleet._slots["i0"]
    await until(lambda: not slot.suspicion.is_set())
    async with aiohttp.ClientSession() as session, session.get(f"{seen.up['i0'].url}/health") as response:
        assert response.status == 200
    assert seen.reports == [("up", "i0")]


async def test_when_nothing_starts_the_error_shows_what_the_engines_wrote(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_ENGINE", "crash")
    with pytest.raises(SetupError) as caught:
        await make(3).start(Recorder())
    assert "i0, i1, i2: exited with status 3" in caught.value.message
    assert "RuntimeError: no such weights" in caught.value.message


@pytest.mark.parametrize(
    ("mode", "reason"), [("mute", "was not ready within 0.5 s"), ("garbled", "port: Input should be")]
)
async def test_an_engine_that_never_announces_itself_fails_the_start(
    make: Make, monkeypatch: pytest.MonkeyPatch, mode: str, reason: str
) -> None:
    monkeypatch.setenv("FAKE_ENGINE", mode)
    patient = 20.0 if mode == "garbled" else 0.5
    with pytest.raises(SetupError, match=reason):
        await make(1, FleetPace(ready_s=patient, grace_s=1.0)).start(Recorder())


async def test_a_starting_engine_is_known_by_what_it_does(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_ENGINE", "loading")
    fleet = make(2, FleetPace(grace_s=1.0))
    starting = asyncio.create_task(fleet.start(Recorder()))
    await until(lambda: fleet.starting() == {"i0": "loading the model", "i1": "loading the model"})
    starting.cancel()
    with suppress(asyncio.CancelledError):
        await starting
    assert fleet.starting() == {}


async def test_a_missing_program_fails_the_start() -> None:
    launch = EngineLaunch(Path("m"), 1, command=("/no/such/program",))
    with pytest.raises(SetupError, match="cannot execute /no/such/program"):
        await LocalFleet(launch, pace=QUICK).start(Recorder())


async def test_one_engine_is_enough_to_start(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FAKE_ENGINE", f"once:{tmp_path / 'taken'}")
    seen = Recorder()
    await make(2).start(seen)
    assert len(seen.up) == 1


async def test_a_crash_loop_is_retried_with_growing_waits(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", logger="tidegate.fleet")
    seen = Recorder()
    await make(1, replace(QUICK, backoff_s=0.1, backoff_max_s=0.4, settled_s=0.5)).start(seen)
    monkeypatch.setenv("FAKE_ENGINE", "crash")
    pid = seen.up["i0"].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await until(lambda: caplog.text.count("i0 did not start") >= 3)
    monkeypatch.setenv("FAKE_ENGINE", "serve")
    await until(lambda: "i0" in seen.up)
    assert seen.reports == [("up", "i0"), ("down", "i0"), ("up", "i0")]
    assert "i0 | RuntimeError: no such weights" in caplog.text
    assert re.findall(r"i0 restarts in (.*) s", caplog.text)[:4] == ["0.1", "0.2", "0.4", "0.4"]
    await asyncio.sleep(0.6)
    caplog.clear()
    os.kill(seen.up["i0"].pid or 0, signal.SIGKILL)
    await until(lambda: "i0 restarts in 0.1 s" in caplog.text)


async def test_an_added_engine_serves_and_a_removed_one_is_gone_for_good(make: Make) -> None:
    fleet, seen = make(1), Recorder()
    with pytest.raises(FleetFull):
        fleet.add()
    await fleet.start(seen)
    assert fleet.add() == "i1"
    await until(lambda: "i1" in seen.up)
    added = seen.up["i1"]
    assert added.pid is not None and alive(added.pid)
    assert added.profile is not None and added.profile == seen.up["i0"].profile
    assert b"--no-self-profile" in Path(f"/proc/{added.pid}/cmdline").read_bytes()
    assert fleet.remove("i1", "drained") and not fleet.remove("i7", "unknown")
    await until(lambda: ("down", "i1") in seen.reports)
    await until(lambda: not alive(added.pid or 0))
    assert fleet.add()
    await until(lambda: "i2" in seen.up)  # A name is used once.
    assert fleet.ids == ("i0",)


async def test_an_added_engine_is_restarted(make: Make) -> None:
    fleet, seen = make(1), Recorder()
    await fleet.start(seen)
    assert fleet.add()
    await until(lambda: "i1" in seen.up)
    os.kill(seen.up["i1"].pid or 0, signal.SIGKILL)
    await until(lambda: seen.reports[1:] == [("up", "i1"), ("down", "i1"), ("up", "i1")])


async def test_an_engine_removed_while_it_starts_never_comes_up(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet, seen = make(1), Recorder()
    await fleet.start(seen)
    monkeypatch.setenv("FAKE_ENGINE", "mute")
    before = children()
    assert fleet.add() and fleet.add()
    assert fleet.remove("i1", "not needed"), "before its process has been started"
    await until(lambda: seen.reports[1:] == [("failed", "i1")])
    await until(lambda: len(children() - before) == 1)
    (pid,) = children() - before
    assert fleet.remove("i2", "not needed") and fleet.remove("i2", "said twice")
    await until(lambda: seen.reports[2:] == [("failed", "i2")])
    await until(lambda: not alive(pid))
    assert not fleet.remove("i2", "it is gone")


def children() -> set[int]:
    """Return the living children of this process."""
    listed = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()
    return {pid for pid in map(int, listed.split()) if alive(pid)}


async def test_an_added_engine_whose_first_start_fails_is_given_up(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet, seen = make(1), Recorder()
    await fleet.start(seen)
    monkeypatch.setenv("FAKE_ENGINE", "crash")
    assert fleet.add()
    await until(lambda: seen.reports[1:] == [("failed", "i1")])
    assert not fleet.remove("i1", "it is gone")
    monkeypatch.setenv("FAKE_ENGINE", "serve")
    assert fleet.add()
    await until(lambda: seen.reports[2:] == [("up", "i2")])


async def test_one_removed_before_the_fleet_is_up_keeps_nobody_waiting(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FAKE_ENGINE", f"slow:{tmp_path / 'taken'}")
    fleet, seen = make(2), Recorder()
    starting = asyncio.create_task(fleet.start(seen))
    await until(lambda: len(fleet._first_starts) == 1)
    (mute,) = {"i0", "i1"} - set(fleet._first_starts)
    assert fleet.remove(mute, "not needed")
    await starting
    (member,) = seen.up.values()
    assert member.profile is not None and member.instance.id != mute


async def test_a_removed_engine_is_down_at_once_and_gets_its_grace(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet, seen = make(1, FleetPace(grace_s=600.0)), Recorder()
    await fleet.start(seen)
    monkeypatch.setenv("FAKE_ENGINE", "stubborn")
    assert fleet.add()
    await until(lambda: "i1" in seen.up)
    pid = seen.up["i1"].pid or 0
    assert fleet.remove("i1", "drained")
    await until(lambda: seen.reports[2:] == [("down", "i1")])
    assert alive(pid)
    await fleet.stop()
    assert not alive(pid), "the fleet's end does not wait for the rest of the grace"
    with pytest.raises(FleetFull, match="does not run"):
        fleet.add()


async def test_stop_stops_added_engines(make: Make) -> None:
    fleet, seen = make(1), Recorder()
    await fleet.start(seen)
    assert fleet.add()
    await until(lambda: len(seen.up) == 2)
    await fleet.stop()
    assert not any(alive(member.pid or 0) for member in seen.ups)
    assert seen.reports == [("up", "i0"), ("up", "i1")]


@pytest.mark.parametrize("mode", ["serve", "stubborn"])
async def test_stop_leaves_no_process(make: Make, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setenv("FAKE_ENGINE", mode)
    seen = Recorder()
    fleet = make(2, FleetPace(grace_s=0.3))
    await fleet.start(seen)
    pids = [m.pid for m in seen.ups if m.pid is not None]
    await fleet.stop()
    await fleet.stop()
    assert len(pids) == 2 and not any(map(alive, pids))
    assert seen.reports == [("up", "i0"), ("up", "i1")] or seen.reports == [("up", "i1"), ("up", "i0")]


async def test_cancelling_the_start_leaves_no_process(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_ENGINE", "mute")
    pids: list[int] = []
    spawn = asyncio.create_subprocess_exec

    async def noting(*args: str, **kwargs: object) -> asyncio.subprocess.Process:
        process = await spawn(*args, **kwargs)  # type: ignore[arg-type]
        pids.append(process.pid)
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", noting)
    starting = asyncio.create_task(make(2).start(Recorder()))
    await until(lambda: len(pids) == 2)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not any(map(alive, pids))


OWNER = """
import asyncio, sys
from dataclasses import replace
from pathlib import Path
from tidegate.fleet.processes import EngineLaunch, LocalFleet

class Listener:
    def member_up(self, member): print(member.pid, flush=True)
    def member_down(self, instance_id, reason): pass

async def main():
    fleet = LocalFleet(EngineLaunch(Path("fake"), 2, command=tuple(sys.argv[1:])))
    await fleet.start(Listener())
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_killing_the_parent_leaves_no_process() -> None:
    owner = await asyncio.create_subprocess_exec(
        sys.executable, "-c", OWNER, *FAKE, stdout=asyncio.subprocess.PIPE
    )
    assert owner.stdout is not None
    pids = [int(await owner.stdout.readline()) for _ in range(2)]
    assert all(map(alive, pids))
    owner.kill()
    await owner.wait()
    await until(lambda: not any(map(alive, pids)))


@pytest.mark.parametrize(("batch_tokens", "seqs"), [(16, "16"), (255, "255"), (512, "256")])
def test_a_small_step_takes_no_more_requests_than_tokens(batch_tokens: int, seqs: str) -> None:
    argv = EngineLaunch(Path("m"), max_batch_tokens=batch_tokens).argv("i0")
    assert argv[argv.index("--max-num-seqs") + 1] == seqs


def test_engines_get_their_pace() -> None:
    assert parse_options(EngineLaunch(Path("m"), pace="l4/m").argv("i0")[3:]).engine.pace == "l4/m"


async def test_a_fleet_grows_to_its_most_and_a_place_is_free_again_once_its_process_has_ended(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet, seen = make(1, FleetPace(grace_s=600.0), most=2), Recorder()
    await fleet.start(seen)
    monkeypatch.setenv("FAKE_ENGINE", "stubborn")
    assert fleet.add() == "i1"
    with pytest.raises(FleetFull, match="has 2 instances, and may have 2"):
        fleet.add()  # one starts
    await until(lambda: "i1" in seen.up)
    pid = seen.up["i1"].pid or 0
    assert fleet.remove("i1", "drained")
    await until(lambda: ("down", "i1") in seen.reports)
    with pytest.raises(FleetFull):
        fleet.add()  # its process has not ended
    os.kill(pid, signal.SIGKILL)
    await until(lambda: fleet.count == 1)
    assert fleet.add() == "i2"


async def test_a_process_killed_while_it_starts_is_told_of_and_its_place_is_free(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet, seen = make(1, most=2), Recorder()
    await fleet.start(seen)
    monkeypatch.setenv("FAKE_ENGINE", "mute")
    before = children()
    assert fleet.add() == "i1"
    await until(lambda: len(children() - before) == 1)
    (pid,) = children() - before
    os.kill(pid, signal.SIGKILL)
    await until(lambda: seen.reports[1:] == [("failed", "i1")])
    await until(lambda: fleet.count == 1)
    monkeypatch.setenv("FAKE_ENGINE", "serve")
    assert fleet.add() == "i2"
    await until(lambda: "i2" in seen.up)
