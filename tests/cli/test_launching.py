"""From settings to a fleet, the cached model, and what is printed."""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tidegate import __version__
from tidegate.cli import launch, model
from tidegate.cli.sources import resolve
from tidegate.core.errors import SetupError
from tidegate.core.instance import Instance
from tidegate.fleet.launched_vllm import LaunchedVllmFleet
from tidegate.fleet.member import FleetListener, Member
from tidegate.fleet.processes import LocalFleet
from tidegate.fleet.static import StaticFleet
from tidegate.policies.protocols import Signal
from tidegate.systems import System
from tidegate_testing.members import GivenFleet


@pytest.mark.parametrize("keyed", [False, True])
def test_the_curl_line_is_a_whole_command(keyed: bool) -> None:
    text = launch.how_to_call("http://127.0.0.1:8000", "it's", keyed=keyed)
    words = shlex.split(text.split("\n\n")[1])
    assert words[:2] == ["curl", "http://127.0.0.1:8000/v1/completions"]
    assert json.loads(words[words.index("-d") + 1])["model"] == "it's"
    assert ("Authorization: Bearer $TIDEGATE_API_KEY" in words) is keyed


def test_the_default_model_is_asked_a_question() -> None:
    words = shlex.split(launch.how_to_call("http://h:1", "smollm2", keyed=False).split("\n\n")[1])
    assert words[1] == "http://h:1/v1/chat/completions"
    assert json.loads(words[-1])["messages"][0]["content"].endswith("?")


def test_models_go_by_a_name_unless_a_folder_has_it(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("smollm2-135m-instruct-0.1.2", f"tiny-llama-{__version__}"):
        (cache / folder).mkdir(parents=True)
        (cache / folder / "config.json").touch()

    def served(**given: object) -> tuple[str, str]:
        config = resolve(None, {}, given, warn=lambda _: None).config
        fleet = launch.make_fleet(config, config.make_system())
        assert isinstance(fleet, LocalFleet)
        return fleet._launch.model.parent.name, fleet._launch.served_model_name

    assert served() == served(model="smollm2") == ("tidegate", "smollm2")
    assert served(model="tiny") == ("tidegate", "tiny-llama")
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").touch()
    assert served(model="tiny") == (tmp_path.name, "tiny")


def test_settings_choose_the_fleet(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    local = resolve(None, {}, {"model": tmp_path, "instances": 2}, warn=lambda _: None).config
    fleet = launch.make_fleet(local, local.make_system())
    assert isinstance(fleet, LocalFleet) and fleet.ids == ("i0", "i1")
    running = resolve(
        None, {}, {"vllm": ["http://a", "http://b"], "system": "static"}, warn=lambda _: None
    ).config
    assert isinstance(launch.make_fleet(running, running.make_system()), StaticFleet)


def test_launching_vllm_takes_the_command_on_path_or_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "config.json").touch()
    given = {"launch": "vllm", "model": tmp_path, "instances": 2}
    config = resolve(None, {}, given, warn=lambda _: None).config
    with pytest.raises(SetupError, match=r"there is no vllm on PATH: install vLLM .* --vllm-bin"):
        launch.make_fleet(config, config.make_system())
    (tmp_path / "vllm").touch(mode=0o755)
    fleet = launch.make_fleet(config, config.make_system())
    assert isinstance(fleet, LaunchedVllmFleet) and fleet.ids == ("i0", "i1")
    assert not (tmp_path / "state").exists(), "nothing is written before the start"


def test_launching_vllm_says_what_a_step_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    (tmp_path / "config.json").touch()
    (tmp_path / "vllm").touch(mode=0o755)
    given = {"launch": "vllm", "model": tmp_path, "instances": 2, "vllm_bin": tmp_path / "vllm"}

    def said(**more: object) -> str:
        config = resolve(None, {}, given | more, warn=lambda _: None).config
        launch.make_fleet(config, config.make_system())
        return capsys.readouterr().out

    assert "on i0, i1: vLLM's default, for no --profile" in said()
    profiled = {"profile": ["h100_sxm/llama-3.1-8b"], "slo": "ttft:500,tpot:50"}
    assert "on i0, i1: 1280 tokens, a step of 50 ms" in said(**profiled)
    assert "on i0, i1: 512 tokens, as the" in said(**profiled, vllm_args="--max-num-batched-tokens 512")


def test_timeouts_reach_the_gateway() -> None:
    given = {"TIDEGATE_STALL_TIMEOUT": "7.5", "TIDEGATE_REQUEST_TIMEOUT": "90"}
    settings = resolve(None, given, {}, warn=lambda _: None).config.gateway_settings()
    assert (settings.stall_s, settings.request_deadline_s) == (7.5, 90.0)


@pytest.mark.parametrize(
    ("ready", "drained", "graceful"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_a_stop_that_was_not_graceful_is_told(
    ready: bool,
    drained: bool,
    graceful: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def run_gateway(*_: object, on_ready: Callable[[str], None]) -> bool:
        if ready:
            on_ready("http://h:1")
        return drained

    monkeypatch.setattr(launch, "run_gateway", run_gateway)
    monkeypatch.setattr(launch, "_log_to_stderr", lambda: None)
    config = resolve(None, {}, {"vllm": ["http://a"]}, warn=lambda _: None).config
    assert launch.launch(config) is graceful
    assert capsys.readouterr().out.splitlines()[-1] == ("stopped" if graceful else "stopped at once")


def test_missing_packages_are_named_with_the_command_that_brings_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model, "find_spec", lambda name: None if name == "torch" else object())
    with pytest.raises(SetupError, match=r"needs torch: pip install torch"):
        model.require_embedded()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "tidegate"


def test_the_tiny_model_is_made_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "config.json").touch()

    monkeypatch.setattr(model, "_make_in_a_process", make)
    folder = model.tiny_model()
    assert model.tiny_model() == folder
    assert len(made) == 1 and (folder / "config.json").is_file()
    assert list(cache.iterdir()) == [folder]


def test_a_failed_making_leaves_nothing_behind(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise SetupError("no space")

    monkeypatch.setattr(model, "_make_in_a_process", fail)
    with pytest.raises(SetupError, match="no space"):
        model.tiny_model()
    assert list(cache.iterdir()) == []


def test_two_makers_at_once_agree(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make_while_another_finishes(folder: Path) -> None:
        (folder / "config.json").touch()
        other = cache / folder.name.removeprefix(".").rsplit("-", 1)[0]
        other.mkdir()
        (other / "config.json").touch()

    monkeypatch.setattr(model, "_make_in_a_process", make_while_another_finishes)
    folder = model.tiny_model()
    assert list(cache.iterdir()) == [folder]


async def test_the_announced_fleet_says_who_comes_up(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    member = Member(Instance("i0", 64, 32), "http://a", "m", "i0-1")
    added = Member(Instance("i1", 64, 32), "http://b", "m", "i1-1")
    now_s = 100.0
    monkeypatch.setattr("tidegate.cli.launch.time.monotonic", lambda: now_s)

    class Scripted:
        ids = ("i0",)
        suspected: str = ""

        def starting(self) -> dict[str, str]:
            return {}

        async def start(self, listener: FleetListener) -> None:
            self.listener = listener
            listener.member_up(member)
            listener.member_down("i0", "was killed by SIGKILL")

        def suspect(self, instance_id: str) -> None:
            self.suspected = instance_id

        def add(self) -> str:
            return "i1"

        def remove(self, instance_id: str, reason: str) -> bool:
            return False

        async def stop(self) -> None:
            pass

    class Gateway:
        heard: tuple[str, ...] = ()

        def member_up(self, member: Member) -> None:
            self.heard += (member.engine_id,)

        def member_down(self, instance_id: str, reason: str) -> None:
            self.heard += (instance_id, reason)

        def start_failed(self, instance_id: str, reason: str) -> None:
            self.heard += (instance_id, reason)

    scripted, gateway = Scripted(), Gateway()
    announced = launch.AnnouncedFleet(scripted)
    await announced.start(gateway)
    announced.suspect("i0")
    now_s += 3.0
    scripted.listener.member_up(member)
    assert announced.add() == "i1"
    now_s += 4.0
    scripted.listener.member_up(added)
    await announced.stop()
    assert gateway.heard == ("i0-1", "i0", "was killed by SIGKILL", "i0-1", "i1-1")
    assert announced.model == "m" and announced.ids == ("i0",) and scripted.suspected == "i0"
    lines = [line.partition(",")[0] for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "  i0 up after 0.0 s: m at http://a",
        "  i0 up after 3.0 s: m at http://a",
        "  i1 up after 4.0 s: m at http://b",
    ]


@pytest.mark.parametrize("terminal", [False, True])
async def test_a_start_shows_what_goes_on(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "PROGRESS_S", 0.0)
    monkeypatch.setattr(launch, "REDRAW_S", 0.0)
    shown = asyncio.Event()

    class Slow(GivenFleet):
        asked = 0

        async def start(self, listener: FleetListener) -> None:
            await shown.wait()
            await super().start(listener)

        def starting(self) -> dict[str, str]:
            self.asked += 1
            if self.asked > 2:
                shown.set()
            return {"i0": "importing torch", "i1": "importing torch", "i2": "measuring"}

    class Gateway:
        def member_up(self, member: Member) -> None: ...
        def member_down(self, instance_id: str, reason: str) -> None: ...
        def start_failed(self, instance_id: str, reason: str) -> None: ...

    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    await launch.AnnouncedFleet(Slow({"i0": "http://a"})).start(Gateway())
    out = capsys.readouterr().out
    line = "  starting for 0 s: i0, i1 importing torch; i2 measuring"
    up = "  i0 up after 0.0 s"
    if terminal:
        assert out.count("\n") == 1, "the line changes in place, and gives way to what stays"
        assert f"\x1b[K{line}\r\x1b[K" in out and f"\x1b[K{up}" in out
    else:
        assert out.splitlines()[:2] == [line, line]
        assert out.splitlines()[-1].startswith(up)


@pytest.mark.parametrize(("moves", "profile"), [(False, ""), (False, "h100_sxm/llama-3.1-8b"), (True, "")])
def test_without_a_kv_connector_vllm_servers_serve_colocated_and_it_is_said(
    moves: bool, profile: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def run_gateway(_: object, fleet: object, system: System, **__: object) -> bool:
        system.check_signals([Signal.PROFILE] if profile else [])
        served.append(system.name)
        return True

    async def hands_on_kv(_: StaticFleet) -> bool:
        return moves

    served: list[str] = []
    monkeypatch.setattr(launch, "run_gateway", run_gateway)
    monkeypatch.setattr(launch, "_log_to_stderr", lambda: None)
    monkeypatch.setattr(StaticFleet, "hands_on_kv", hands_on_kv)
    given = {"vllm": ["http://a", "http://b"], **({"profile": [profile]} if profile else {})}
    launch.launch(resolve(None, {}, given, warn=lambda _: None).config)
    colocated = "colocated+held-feasible-sjf" if profile else "colocated"
    assert served == (["static"] if moves else [colocated])
    assert ("no KV connector, so nothing can be disaggregated" in capsys.readouterr().err) is not moves
