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
from tidegate.cli.model import ARCH, require_embedded, tiny_model
from tidegate.cli.terminal import debugging, warn
from tidegate.core.errors import SetupError
from tidegate.costs.named_profile import load_profile, measured_profile, profile_line, profile_warnings
from tidegate.costs.profile import Profile
from tidegate.fleet.emulated import EmulatedFleet, EmulatedLaunch
from tidegate.fleet.launched_vllm import LaunchedVllmFleet, VllmLaunch
from tidegate.fleet.member import Fleet, FleetListener, Member
from tidegate.fleet.processes import EngineLaunch, LocalFleet
from tidegate.fleet.static import StaticFleet
from tidegate.fleet.vllm import ServeArguments
from tidegate.gateway.run import run_gateway


def launch(config: Config) -> bool:
    """Serve until stopped; return False when that was before it served or in the middle of requests.

    Raises SetupError.
    """
    _log_to_stderr()
    system = config.scheduling.make_system()
    settings = config.gateway_settings()
    typer.echo(
        f"tidegate {__version__}: system {system.name} ({system.summary}), SLO {settings.slo}, "
        f"instances {config.fleet.size}"
    )
    keyed = bool(settings.api_key or settings.tenants)
    if not keyed and not _is_loopback(settings.host):
        warn(f"{settings.host} is open to the network and no API key is set")
    announced = AnnouncedFleet(make_fleet(config))
    served = False

    def on_ready(base_url: str) -> None:
        nonlocal served
        served = True
        _show_profiles(config.fleet.profile or (), announced.model)
        typer.echo(how_to_call(base_url, announced.model, keyed=keyed))

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
        key = source.vllm_api_key or ""
        return StaticFleet(source.vllm, api_key=key, profiles=_profiles(source), kv=source.kv)
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
    """Return the fleet, not yet started, and print where its logs are. Raises SetupError without vLLM."""
    assert source.model is not None
    launch = VllmLaunch(
        model=source.model,
        program=vllm_program(source.vllm_bin),
        logs=source.vllm_logs.resolve() if source.vllm_logs else new_log_folder(),
        instances=source.instances,
        arguments=ServeArguments(shlex.split(source.vllm_args or "")),
        api_key=source.vllm_api_key or "",
    )
    fleet = LaunchedVllmFleet(launch, profiles=_profiles(source))
    typer.echo(f"  vLLM: {launch.program}, logs in {launch.logs}")
    return fleet


def _profiles(source: FleetSection) -> list[Profile]:
    return [load_profile(name).profile for name in source.profile or ()]


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
    """A fleet that prints which instances come up and when, and passes everything else on."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.ids = fleet.ids
        self.suspect, self.add, self.remove, self.stop = fleet.suspect, fleet.add, fleet.remove, fleet.stop
        self.model = ""
        """The model of the first member that came up."""

    async def start(self, listener: FleetListener) -> None:
        self._began_s = time.monotonic()
        self._member_up = listener.member_up
        self.member_down, self.start_failed = listener.member_down, listener.start_failed
        await self._fleet.start(self)

    def member_up(self, member: Member) -> None:
        self.model = self.model or member.model
        typer.echo(
            f"  {member.instance.id} up after {time.monotonic() - self._began_s:.1f} s: {member.model} at "
            f"{member.url}, KV for {member.instance.kv_capacity_tokens} tokens"
        )
        self._member_up(member)


def _show_profiles(names: Sequence[str], model: str) -> None:
    """Print what the measured ones among the profiles are, how old, and what speaks against them."""
    now = datetime.now(UTC)
    for name in names:
        saved = measured_profile(name)
        if saved is not None:
            typer.echo(f"  profile {name}: {profile_line(saved, now)}")
            for warning in profile_warnings(saved, model, now):
                warn(f"{name}: {warning}")


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
