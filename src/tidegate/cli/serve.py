"""``tidegate serve``: an OpenAI-compatible endpoint over a fleet of instances."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from tidegate.cli.process import INTERRUPTED

_CLIENTS, _DECISIONS = "Clients", "Scheduling"
_FLEET, _ENGINES, _EMULATED = "Instances", "Embedded engines", "Emulated instances"
_LAUNCHED = "Launched vLLM servers"
# Written out, so that the help does not import the policies.
_SYSTEMS = (
    "arrow (Arrow as published, version 2), arrow-lending (SLO-aware placement with role flips), arrow-v1 "
    "(four elastic pools), colocated (both phases on one instance), minimal-load (static split, least "
    "predicted time first), round-robin (static split, each pool in turn) or static (static split, fewest "
    "tokens first); with embedded engines any of them as NAME+ORDER, where waiting prefills are served by "
    "fifo, edf (earliest deadline), sjf (shortest) or feasible-first (earliest deadline that can still be "
    "met), as in arrow-lending+feasible-first"
)

EPILOG = """
[bold]Examples[/bold]

    tidegate serve

    tidegate serve --model models/qwen3-0.6b --instances 4 --slo ttft:500,tpot:50

    tidegate serve --emulate h100_sxm/llama-3.1-8b:8 --slo ttft:500,tpot:50

    tidegate serve --vllm http://10.0.0.5:8000 --vllm http://10.0.0.6:8000 --profile measured.json

    tidegate serve --launch vllm --model models/qwen3-8b --instances 4 --vllm-bin /opt/vllm/bin/vllm

    tidegate serve --config serve.toml --print-config
"""


def register(app: typer.Typer) -> None:
    """Add the verb to ``app``."""
    app.command("serve", epilog=EPILOG, rich_help_panel="Serve")(serve)


def serve(
    ctx: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", envvar="TIDEGATE_CONFIG", help="Settings in TOML; see --print-config."),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved settings as TOML and exit.")
    ] = False,
    host: Annotated[
        str | None,
        typer.Option(help="Address to listen on.", show_default="127.0.0.1", rich_help_panel=_CLIENTS),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            help="Port to listen on; 0 takes a free one.", show_default="8000", rich_help_panel=_CLIENTS
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="Key that clients must send. Other users of this machine can see it here: "
            "TIDEGATE_API_KEY or --api-key-file hide it.",
            rich_help_panel=_CLIENTS,
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File that holds the key.", rich_help_panel=_CLIENTS),
    ] = None,
    journal: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write every decision and outcome there, as JSON lines.",
            rich_help_panel=_CLIENTS,
        ),
    ] = None,
    request_timeout: Annotated[
        float | None,
        typer.Option(
            metavar="S", help="Longest that a request may take.", show_default="600", rich_help_panel=_CLIENTS
        ),
    ] = None,
    stall_timeout: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            help="Silence of an engine after which its requests go elsewhere; above the time of the longest "
            "prefill.",
            show_default="60",
            rich_help_panel=_CLIENTS,
        ),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"The composition of policies that decides: {_SYSTEMS}. In front of vLLM servers the "
            "default is static unless there is a --profile of them, which the others but round-robin need.",
            show_default="arrow-lending",
            rich_help_panel=_DECISIONS,
        ),
    ] = None,
    slo: Annotated[
        str | None,
        typer.Option(
            metavar="ttft:MS,tpot:MS",
            help="Latency targets of requests that bring none.",
            show_default="ttft:1000,tpot:50",
            rich_help_panel=_DECISIONS,
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="P:D",
            help="Prefill and decode instances at start-up.",
            show_default="even",
            rich_help_panel=_DECISIONS,
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Model for embedded engines or launched servers, in the Hugging Face layout.",
            show_default="a tiny random one",
            rich_help_panel=_FLEET,
        ),
    ] = None,
    instances: Annotated[
        int | None,
        typer.Option(
            help="Number of embedded engines or launched servers.", show_default="3", rich_help_panel=_FLEET
        ),
    ] = None,
    launch: Annotated[
        str | None,
        typer.Option(
            metavar="vllm",
            help="Start stock `vllm serve` processes, in place of embedded engines, and keep them alive: one "
            "per GPU where there are any. They hand KV to each other.",
            rich_help_panel=_FLEET,
        ),
    ] = None,
    emulate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GPU/MODEL:N",
            help="N emulated instances of a packaged profile (`profile --list` shows them), in place of "
            "embedded engines: real HTTP and made-up tokens, at the pace of that GPU. Repeat for a mixed "
            "fleet of one model.",
            rich_help_panel=_FLEET,
        ),
    ] = None,
    vllm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL",
            help="A running vLLM server, in place of embedded engines; repeat for each. KV moves between "
            "those that have NixlConnector ('tidegate check' proves it), or another --kv-connector; "
            "prefill=URL and decode=URL are servers that may do only that.",
            rich_help_panel=_FLEET,
        ),
    ] = None,
    kv_connector: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How running vLLM servers hand on KV: nixl, mooncake, none, or auto for what their metrics "
            "show, which is NIXL only.",
            show_default="auto",
            rich_help_panel=_FLEET,
        ),
    ] = None,
    kv_lease_s: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            help="How long running vLLM servers keep KV for a pull: NixlConnector's kv_lease_duration, or "
            "Mooncake's VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT.",
            show_default="vLLM's: 30 with nixl, 480 with mooncake",
            rich_help_panel=_FLEET,
        ),
    ] = None,
    kv_bootstrap: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL",
            help="Where MooncakeConnector's bootstrap server of each vLLM server is, in their order; other "
            "servers reach it there, too.",
            show_default="port 8998 of each server",
            rich_help_panel=_FLEET,
        ),
    ] = None,
    kv_read_back: Annotated[
        bool | None,
        typer.Option(
            "--kv-read-back/--no-kv-read-back",
            help="Let a prefill on a running vLLM server begin with KV that earlier rounds left on another. "
            "Only for servers that have bidirectional_kv_xfer ('tidegate check' proves it): others hang.",
            show_default="False",
            rich_help_panel=_FLEET,
        ),
    ] = None,
    profile: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE|NAME",
            help="What the vLLM servers' steps cost: a file of `tidegate profile --vllm URL --out FILE`, or "
            "a packaged profile (`profile --list` shows them). One for all, or one for each in their order.",
            rich_help_panel=_FLEET,
        ),
    ] = None,
    vllm_args: Annotated[
        str | None,
        typer.Option(
            metavar="'WORDS'",
            help="Further arguments of `vllm serve`, in quotes: '--tensor-parallel-size 2' gives each server "
            "two GPUs.",
            rich_help_panel=_LAUNCHED,
        ),
    ] = None,
    vllm_bin: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="vLLM's command, in whatever environment it is installed.",
            show_default="vllm on PATH",
            rich_help_panel=_LAUNCHED,
        ),
    ] = None,
    vllm_logs: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where the servers' output goes, a file for each instance.",
            show_default="a new folder in ~/.local/state/tidegate",
            rich_help_panel=_LAUNCHED,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda or cuda:N.", show_default="cpu", rich_help_panel=_ENGINES),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="auto, float32, float64, bfloat16 or float16. float64 makes tokens independent of "
            "scheduling, at about twice the time.",
            show_default="auto",
            rich_help_panel=_ENGINES,
        ),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS",
            help="Longest prompt plus answer.",
            show_default="the model's",
            rich_help_panel=_ENGINES,
        ),
    ] = None,
    kv_memory_mb: Annotated[
        int | None,
        typer.Option(
            metavar="MB", help="KV cache of each engine.", show_default="256", rich_help_panel=_ENGINES
        ),
    ] = None,
    max_batch_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS",
            help="Tokens that one engine step may process.",
            show_default="512",
            rich_help_panel=_ENGINES,
        ),
    ] = None,
    chunk_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Token budget of a step.", show_default="8192", rich_help_panel=_EMULATED
        ),
    ] = None,
    host_ms: Annotated[
        float | None,
        typer.Option(
            metavar="MS", help="Host time added to every step.", show_default="0", rich_help_panel=_EMULATED
        ),
    ] = None,
    front_ms: Annotated[
        float | None,
        typer.Option(
            metavar="MS",
            help="From dispatch to the engine's queue, per leg, beside what HTTP takes here.",
            show_default="0",
            rich_help_panel=_EMULATED,
        ),
    ] = None,
) -> None:
    """Serve a model over several instances, behind one OpenAI-compatible endpoint.

    Without options it starts three engines on this machine's CPU with a
    tiny random model, and prints a curl line that works. Ctrl-C drains and
    stops; a second Ctrl-C stops at once.

    A setting can also stand in the file (--config) or in the environment
    (--port is TIDEGATE_PORT). A flag wins over the environment, the
    environment over the file. Exit codes: 0 stopped; 2 wrong settings, or
    nothing could start; 130 Ctrl-C during the start, or a second one.
    """
    from tidegate.cli.config import SETTINGS
    from tidegate.cli.launch import launch as serve_until_stopped
    from tidegate.cli.resolved_toml import as_toml
    from tidegate.cli.sources import resolve

    flags = {name: value for name, value in ctx.params.items() if name in SETTINGS and value not in ((), [])}
    resolved = resolve(
        config, os.environ, flags, warn=lambda text: typer.echo(f"tidegate: warning: {text}", err=True)
    )
    if print_config:
        typer.echo(as_toml(resolved), nl=False)
        return
    if not serve_until_stopped(resolved.config):
        raise typer.Exit(INTERRUPTED)
