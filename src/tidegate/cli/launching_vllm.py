"""From settings to a fleet of vLLM servers that tidegate starts itself."""

from __future__ import annotations

import os
import shlex
import shutil
from datetime import datetime
from pathlib import Path

import typer

from tidegate.cli.config import FleetSection
from tidegate.core.errors import SetupError
from tidegate.costs.named_profile import load_profile
from tidegate.fleet.launched_vllm import LaunchedVllmFleet, VllmLaunch
from tidegate.fleet.vllm_command import ServeArguments


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
