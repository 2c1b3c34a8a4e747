"""From resolved settings to a running gateway."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import orjson
import typer

from tidegate import __version__
from tidegate.cli.config import Config
from tidegate.cli.fleet_config import FleetSection
from tidegate.cli.instance_keys import KeyFile, state_folder
from tidegate.cli.model import NAMED, SMOLLM2, named_model, require_embedded
from tidegate.cli.terminal import debugging, note_cold_start, warn
from tidegate.core.errors import SetupError
from tidegate.costs.named_profile import load_profile, measured_profile, profile_line, profile_warnings
from tidegate.costs.profile import Profile
from tidegate.fleet.emulated import EmulatedFleet, EmulatedLaunch
from tidegate.fleet.launched_vllm import LaunchedVllmFleet, VllmLaunch
from tidegate.fleet.member import Fleet, FleetListener, Member
from tidegate.fleet.processes import EngineLaunch, LocalFleet
from tidegate.fleet.static import StaticFleet
from tidegate.fleet.step_choice import StepChoice
from tidegate.fleet.vllm import ServeArguments
from tidegate.gateway.run import run_gateway
from tidegate.policies.baselines import Colocated
from tidegate.policies.chunks import FIXED
from tidegate.policies.order import FIFO
from tidegate.systems import System, make_system

COLOCATED = "colocated"
REDRAW_S, PROGRESS_S = 0.5, 5.0


def launch(config: Config) -> bool:
    """Serve until stopped; return False when that was before it served or in the middle of requests.

    Raises SetupError.
    """
    _log_to_stderr()
    composed = config.composed()
    system = config.served(composed)
    settings = config.gateway_settings()
    typer.echo(
        f"tidegate {__version__}: system {system.name} ({system.summary}), SLO {settings.slo}, "
        f"instances {config.fleet.range}"
    )
    keyed = bool(settings.api_key or settings.tenants)
    if not keyed and not _is_loopback(settings.host):
        warn(f"{settings.host} is open to the network and no API key is set")
    chunks = composed.chunks
    if system.chunks is None and chunks is not None and not chunks.steady:
        warn(
            f"{system.name} chooses chunks by {chunks.name}, which vLLM takes from nobody: steps carry what "
            "--max-num-batched-tokens said at the servers' launch"
        )
    if config.scheduling.warm_start is not None and not config.answered():
        note_cold_start(config.scheduling.warm_start)
    fleet = make_fleet(config, system)
    if system.name != COLOCATED and config.fleet.range.most > 1 and not _hands_on_kv(fleet, config.fleet):
        system = colocated_without_kv(config, system)
    announced = AnnouncedFleet(fleet)
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


def _hands_on_kv(fleet: Fleet, source: FleetSection) -> bool:
    """Tell whether instances pull KV of each other, which vLLM servers may lack a connector for."""
    if isinstance(fleet, StaticFleet):
        return asyncio.run(fleet.hands_on_kv())
    launched = source.launch == "vllm"
    return not launched or ServeArguments(shlex.split(source.vllm_args or "")).kv_transfer.connector != "none"


def colocated_without_kv(config: Config, named: System) -> System:
    """Return the system that serves in the place of ``named``, in its order, and say why."""
    warn(
        f"these vLLM servers have no KV connector, so nothing can be disaggregated: {COLOCATED} serves, not "
        f"{named.name}, which would compute every prompt twice (if they have one: --kv-connector)"
    )
    system = make_system(COLOCATED, slo=config.scheduling.slo)
    if config.fleet.profile:
        order = named.order
        return system if order.name == FIFO.name else system.ordered(order, f"{COLOCATED}+{order.name}")
    both = Colocated(needs=frozenset())  # All servers are taken for alike, and go by what each has to do.
    return replace(system, prefill=both, decode=both)


def make_fleet(config: Config, system: System) -> Fleet:
    """Return the fleet that the settings describe, not yet started, whose engines do what ``system`` asks of
    them; gets a model that goes by a name."""
    source, engine = config.fleet, config.engine
    if source.vllm:
        key = source.vllm_api_key or ""
        return StaticFleet(source.vllm, api_key=key, profiles=_profiles(source), kv=source.kv)
    if source.launch == "vllm":
        return launched_vllm(source, config.first_size, config.scheduling.slo.tpot_s)
    first = config.first_size
    order, chunks = system.order.in_engines.name, (system.chunks or FIXED).name
    log_level = "info" if debugging() else "warning"
    if source.emulate:
        pretended = config.emulated
        return EmulatedFleet(
            EmulatedLaunch(
                source.groups(first),
                order=order,
                chunks=chunks,
                max_batch_tokens=pretended.chunk_tokens,
                host_s=pretended.host_ms / 1000.0,
                front_s=pretended.front_ms / 1000.0,
                start_delay_s=pretended.start_delay,
                log_level=log_level,
            )
        )
    require_embedded()
    folder, served_name = model_to_serve(source.model or Path(SMOLLM2))
    return LocalFleet(
        EngineLaunch(
            model=folder,
            instances=first,
            most=source.instances.ceiling,
            served_model_name=served_name,
            device=engine.device,
            dtype=engine.dtype,
            max_model_len=engine.max_model_len,
            kv_memory_mb=engine.kv_memory_mb,
            max_batch_tokens=engine.max_batch_tokens,
            threads=engine.threads,
            pace=engine.pace or "",
            predictor=engine.predictor,
            order=order,
            chunks=chunks,
            log_level=log_level,
            zygote=True,
        )
    )


def model_to_serve(model: Path) -> tuple[Path, str]:
    """Return the folder of a model, given as one or by its name, and the name to serve it by."""
    if str(model) in NAMED:
        return named_model(str(model)), NAMED[str(model)]
    return model, model.name


def launched_vllm(source: FleetSection, first: int, tpot_s: float) -> LaunchedVllmFleet:
    """Return the fleet, not yet started, which begins with ``first`` servers, whose steps are to keep
    ``tpot_s``; print where its logs are and what a step takes. Raises SetupError without vLLM."""
    assert source.model is not None
    folder, _ = model_to_serve(source.model)
    launch = VllmLaunch(
        model=folder,
        program=vllm_program(source.vllm_bin),
        logs=source.vllm_logs.resolve() if source.vllm_logs else new_log_folder(),
        instances=first,
        most=source.instances.ceiling,
        arguments=ServeArguments(shlex.split(source.vllm_args or "")),
        api_key=source.vllm_api_key or "",
        tpot_s=tpot_s,
    )
    fleet = LaunchedVllmFleet(launch, profiles=_profiles(source))
    typer.echo(f"  vLLM: {launch.program}, logs in {launch.logs}")
    alike: dict[StepChoice, list[str]] = {}
    for name in fleet.ids:
        alike.setdefault(fleet.step_of(name), []).append(name)
    for step, names in alike.items():
        line = f"budget of a step (--max-num-batched-tokens) on {', '.join(names)}: {step}"
        typer.echo(f"  {line}") if step.fits else warn(line)
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
    return state_folder() / "vllm" / f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"


class AnnouncedFleet:
    """A fleet that prints which instances come up and how long that took, from the fleet's start, from when
    one was asked for, or from when it went down. Until the first start is over it also prints what the others
    do: one line that changes on a terminal, else one every ``PROGRESS_S``. Passes everything else on."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.ids = fleet.ids
        self.starting = fleet.starting
        self.suspect, self.remove = fleet.suspect, fleet.remove
        self._away_since_s: dict[str, float] = {}
        self._keys = KeyFile()
        self.model = ""
        """The model of the first member that came up."""

    async def start(self, listener: FleetListener) -> None:
        self._began_s = time.monotonic()
        self._listener = listener
        self.start_failed = listener.start_failed
        progress = asyncio.create_task(self._show_progress())
        try:
            await self._fleet.start(self)
        finally:
            progress.cancel()
            self._clear_line()

    async def stop(self) -> None:
        self._keys.remove()
        await self._fleet.stop()

    async def _show_progress(self) -> None:
        while True:
            await asyncio.sleep(REDRAW_S if sys.stdout.isatty() else PROGRESS_S)
            alike: dict[str, list[str]] = {}
            for instance_id, stage in self._fleet.starting().items():
                alike.setdefault(stage, []).append(instance_id)
            stages = "; ".join(f"{', '.join(ids)} {stage}" for stage, ids in alike.items())
            line = f"  starting for {time.monotonic() - self._began_s:.0f} s: {stages}"
            self._clear_line()
            if sys.stdout.isatty():
                typer.echo(line[: shutil.get_terminal_size().columns - 1], nl=False)
            elif stages:
                typer.echo(line)

    @staticmethod
    def _clear_line() -> None:
        if sys.stdout.isatty():
            typer.echo("\r\x1b[K", nl=False)

    def add(self) -> str:
        instance_id = self._fleet.add()
        self._away_since_s[instance_id] = time.monotonic()
        return instance_id

    def member_down(self, instance_id: str, reason: str) -> None:
        self._away_since_s[instance_id] = time.monotonic()
        self._listener.member_down(instance_id, reason)

    def member_up(self, member: Member) -> None:
        since_s = self._away_since_s.pop(member.instance.id, self._began_s)
        self.model = self.model or member.model
        self._keys.add(member)
        self._clear_line()
        typer.echo(
            f"  {member.instance.id} up after {time.monotonic() - since_s:.1f} s: {member.model} at "
            f"{member.url}, KV for {member.instance.kv_capacity_tokens} tokens"
        )
        self._listener.member_up(member)


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
    path, body = "completions", {"model": model, "prompt": "The tide", "max_tokens": 16}
    if model == SMOLLM2:
        question = {"role": "user", "content": "What is the capital of France?"}
        path, body = "chat/completions", {"model": model, "temperature": 0, "messages": [question]}
    data = shlex.quote(orjson.dumps(body).decode())
    key = ' -H "Authorization: Bearer $TIDEGATE_API_KEY"' if keyed else ""
    return (
        f"serving on {base_url}/v1 (Ctrl-C drains and stops); try:\n\n"
        f"  curl {base_url}/v1/{path} -H 'Content-Type: application/json'{key} -d {data}\n"
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
