"""From resolved settings to a running gateway."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import shutil
import time
from collections.abc import Callable, Coroutine, Sequence
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import orjson
import typer

from tidegate import __version__
from tidegate.cli.config import Config, FleetSection
from tidegate.cli.process import debugging
from tidegate.cli.tiny import ARCH, require_embedded, tiny_model
from tidegate.core.errors import SetupError
from tidegate.costs.named_profile import load_profile, measured_profile, profile_line, profile_warnings
from tidegate.fleet.emulated import EmulatedFleet, EmulatedLaunch
from tidegate.fleet.launched_vllm import LaunchedVllmFleet, VllmLaunch
from tidegate.fleet.member import Fleet, FleetListener, Member
from tidegate.fleet.processes import EngineLaunch, LocalFleet
from tidegate.fleet.static import StaticFleet
from tidegate.fleet.vllm import ServeArguments
from tidegate.gateway.run import run_gateway

Say = Callable[[str], None]


def launch(config: Config) -> bool:
    """Serve until told to stop; False when stopped before it served or in the middle of requests.

    Raises SetupError.
    """
    _log_to_stderr()
    system = config.scheduling.make_system()
    settings = config.gateway_settings()
    typer.echo(
        f"tidegate {__version__}: system {system.name} ({system.summary}), SLO {settings.slo}, "
        f"instances {config.fleet.size}"
    )
    if not settings.api_key and not _is_loopback(settings.host):
        typer.echo(
            f"tidegate: warning: {settings.host} is open to the network and no API key is set", err=True
        )
    announced = AnnouncedFleet(make_fleet(config), typer.echo)

    served = False

    def on_ready(base_url: str) -> None:
        nonlocal served
        served = True
        _tell_profiles(config.fleet.profile or (), announced.model)
        typer.echo(how_to_call(base_url, announced.model, keyed=bool(settings.api_key)))

    serving: Coroutine[Any, Any, object] = run_gateway(settings, announced, system, on_ready=on_ready)
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            graceful = runner.run(serving) is not False and served
    except KeyboardInterrupt:
        return False
    typer.echo("stopped" if graceful else "stopped at once")
    return graceful


def make_fleet(config: Config) -> Fleet:
    """Return the fleet that the settings describe, not yet started; makes the tiny model if needed."""
    source, engine = config.fleet, config.engine
    if source.vllm:
        profiles = [load_profile(name).profile for name in source.profile or ()]
        return StaticFleet(source.vllm, api_key=source.vllm_api_key or "", profiles=profiles, kv=source.kv)
    if source.launch == "vllm":
        return launched_vllm(source)
    order = config.scheduling.make_system().order.name
    log_level = "info" if debugging() else "warning"
    if source.emulate:
        pretended = config.emulated
        return EmulatedFleet(
            EmulatedLaunch(
                tuple(source.emulate),
                order=order,
                max_batch_tokens=pretended.chunk_tokens,
                host_s=pretended.host_ms / 1000.0,
                front_s=pretended.front_ms / 1000.0,
                log_level=log_level,
            )
        )
    require_embedded()
    folder = source.model or tiny_model()
    return LocalFleet(
        EngineLaunch(
            model=folder,
            instances=source.instances,
            served_model_name=folder.name if source.model else f"tiny-{ARCH}",
            device=engine.device,
            dtype=engine.dtype,
            max_model_len=engine.max_model_len,
            kv_memory_mb=engine.kv_memory_mb,
            max_batch_tokens=engine.max_batch_tokens,
            order=order,
            log_level=log_level,
        )
    )


def launched_vllm(source: FleetSection) -> LaunchedVllmFleet:
    """Return the fleet, not yet started, and say where its logs are. Raises SetupError without vLLM."""
    assert source.model is not None
    launch = VllmLaunch(
        model=source.model,
        program=vllm_program(source.vllm_bin),
        logs=source.vllm_logs.resolve() if source.vllm_logs else new_log_folder(),
        instances=source.instances,
        arguments=ServeArguments(shlex.split(source.vllm_args or "")),
        api_key=source.vllm_api_key or "",
    )
    profiles = [load_profile(name).profile for name in source.profile or ()]
    fleet = LaunchedVllmFleet(launch, profiles=profiles)
    typer.echo(f"  vLLM: {launch.program}, logs in {launch.logs}")
    return fleet


def vllm_program(given: Path | None) -> Path:
    """Return vLLM's command: the one given, or the one on PATH. Raises SetupError when it cannot be run."""
    found = shutil.which(str(given) if given else "vllm")
    if found:
        return Path(found).absolute()
    reason = f"{given} is no program that can be run" if given else "there is no vllm on PATH"
    raise SetupError(
        f"{reason}: install vLLM in an environment of its own and name its command with --vllm-bin, as in "
        "--vllm-bin /opt/vllm/bin/vllm"
    )


def new_log_folder() -> Path:
    """Return a folder for the logs of this launch, which does not exist yet."""
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(state) / "tidegate" / "vllm" / f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"


class AnnouncedFleet:
    """A fleet that says who comes up, with the seconds since the start, and passes everything on (the
    fleet itself logs who goes down)."""

    def __init__(self, fleet: Fleet, say: Say) -> None:
        self._fleet = fleet
        self._say = say
        self._listener: FleetListener | None = None
        self._began_s = 0.0
        self.model = ""
        """The model of the first member that came up."""

    @property
    def ids(self) -> tuple[str, ...]:
        return self._fleet.ids

    async def start(self, listener: FleetListener) -> None:
        self._listener = listener
        self._began_s = time.monotonic()
        await self._fleet.start(self)

    def suspect(self, instance_id: str) -> None:
        self._fleet.suspect(instance_id)

    def add(self) -> bool:
        return self._fleet.add()

    def remove(self, instance_id: str, reason: str) -> bool:
        return self._fleet.remove(instance_id, reason)

    async def stop(self) -> None:
        await self._fleet.stop()

    def member_up(self, member: Member) -> None:
        self.model = self.model or member.model
        after_s = time.monotonic() - self._began_s
        capacity = member.instance.kv_capacity_tokens
        self._say(
            f"  {member.instance.id} up after {after_s:.1f} s: {member.model} at {member.url}, "
            f"KV for {capacity} tokens"
        )
        if self._listener is not None:
            self._listener.member_up(member)

    def member_down(self, instance_id: str, reason: str) -> None:
        if self._listener is not None:
            self._listener.member_down(instance_id, reason)

    def start_failed(self, instance_id: str, reason: str) -> None:
        if self._listener is not None:
            self._listener.start_failed(instance_id, reason)


def _tell_profiles(names: Sequence[str], model: str) -> None:
    """Say what the measured ones among the profiles are, how old, and what speaks against them."""
    now = datetime.now(UTC)
    for name in names:
        saved = measured_profile(name)
        if saved is None:
            continue
        typer.echo(f"  profile {name}: {profile_line(saved, now)}")
        for warning in profile_warnings(saved, model, now):
            typer.echo(f"tidegate: warning: {name}: {warning}", err=True)


def how_to_call(base_url: str, model: str, *, keyed: bool) -> str:
    """Return the endpoint and a curl line for it, for a shell where TIDEGATE_API_KEY is set if ``keyed``."""
    body = orjson.dumps({"model": model, "prompt": "The tide", "max_tokens": 16}).decode()
    key = ' -H "Authorization: Bearer $TIDEGATE_API_KEY"' if keyed else ""
    return (
        f"serving on {base_url}/v1 (Ctrl-C drains and stops); try:\n\n"
        f"  curl {base_url}/v1/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}\n"
    )


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("tidegate")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debugging() else logging.INFO)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return uvloop's factory where it is installed (it does not exist for every platform)."""
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
