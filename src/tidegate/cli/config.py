"""The settings of ``tidegate serve``: what exists, what is allowed, what the defaults are, how it is told.

A setting is a field of a section. ``[gateway] port`` in the file is ``--port`` on the command line and
``TIDEGATE_PORT`` in the environment: field names are unique over all sections. A field without a ``Flag``
has no option on the command line. Defaults that are measured or derived elsewhere are None here.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tidegate.api import DEFAULT_SYSTEM
from tidegate.cli.options import Flag, OptionGroup, given_type
from tidegate.cli.setting_types import (
    Bootstraps,
    Count,
    Fields,
    FilePath,
    Groups,
    Key,
    Milliseconds,
    ModelFolder,
    Multiple,
    Networks,
    Origins,
    Profiles,
    Seconds,
    ServeWords,
    Split,
    SystemName,
    Targets,
    Tokens,
    Urls,
    Whole,
    Words,
    with_value_errors,
)
from tidegate.cli.systems_help import SYSTEMS_HELP
from tidegate.core.slo import Slo
from tidegate.gateway.settings import GatewaySettings

if TYPE_CHECKING:
    from tidegate.fleet.vllm import KvSetup
    from tidegate.systems.system import System

GATEWAY = GatewaySettings()
"""The gateway's own defaults."""


def setting(
    default: Any,
    text: str,
    metavar: str | None = None,
    *,
    name: str = "",
    panel: str | None = None,
    shown: bool | str = True,
    needs: tuple[str, ...] = (),
    **checks: Any,
) -> Any:
    """Return the field of a setting that has a flag; ``checks`` are those of pydantic's ``Field``."""
    field = Field(default, **checks)
    field.metadata.append(Flag(text, metavar, name, panel, shown, needs=needs))
    return field


launched = partial(setting, panel="Launched vLLM servers", needs=("launch",))
running = partial(setting, needs=("vllm",))
emulated = partial(setting, needs=("emulate",))


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    panel: ClassVar[str] = ""
    """Where the help shows the section's flags."""


class GatewaySection(Section):
    """Where clients connect."""

    panel = "Clients"

    host: str = setting(GATEWAY.host, "Address to listen on.", min_length=1)
    port: Whole = setting(GATEWAY.port, "Port to listen on; 0 takes a free one.", ge=0, le=65535)
    api_key: Key | None = setting(
        None,
        "Key that clients must send. Other users of this machine can see it here: TIDEGATE_API_KEY or "
        "--api-key-file hide it.",
        "KEY",
        repr=False,
    )
    api_key_file: Path | None = setting(
        None,
        "File that holds the key, or lines NAME KEY: the keys of tenants, beside a line with the "
        "operator's KEY alone.",
        "FILE",
    )
    tenants: dict[str, str] | None = Field(
        None, repr=False, description="Tenants by their keys: no flag, they come from api_key_file."
    )
    trusted_proxies: Networks | None = setting(
        None, "Addresses or networks whose x-tenant-id header is believed.", "ADDRESS"
    )
    allowed_hosts: Words | None = setting(
        None, "Host names that a gateway without a key answers to, beside localhost.", "NAME"
    )
    allow_fields: Fields | None = setting(
        None,
        "Body fields to let through to vLLM that are refused because they run or configure code: "
        "chat_template, mm_processor_kwargs, media_io_kwargs.",
        "FIELD",
    )
    journal: FilePath | None = setting(
        None, "Write every decision and outcome there, as JSON lines; one that is there goes on.", "FILE"
    )
    journal_inputs: bool = setting(
        GATEWAY.journal_inputs,
        "Write also all that the scheduler is told, from which its decisions can be taken again.",
        needs=("journal",),
    )
    request_timeout: Seconds = setting(GATEWAY.request_deadline_s, "Longest that a request may take.", "S")
    stall_timeout: Seconds = setting(
        GATEWAY.stall_s,
        "Silence of an engine after which its requests go elsewhere; above the time of the longest prefill.",
        "S",
    )
    stream_head: Seconds = setting(
        GATEWAY.head_after_s,
        "Wait for a stream's first token before its head is sent alone; a later failure has the HTTP status "
        "200 and comes as an event.",
        "S",
    )
    cors_origins: Origins | None = setting(
        None,
        "Where web pages come from that may call the gateway from a browser, as https://chat.example; * for "
        "any. Repeat for each.",
        "ORIGIN",
        name="--cors-origin",
    )


class SchedulingSection(Section):
    """Who decides, and for which targets."""

    panel = "Scheduling"

    system: SystemName = setting(DEFAULT_SYSTEM, SYSTEMS_HELP, "NAME")
    slo: Targets = setting(GATEWAY.slo, "Latency targets of requests that bring none.", "ttft:MS,tpot:MS")
    admission: Multiple = setting(
        GATEWAY.admission,
        "Refuse a request with 429 when its first token is predicted to take more than so many times its "
        "TTFT target; 0 takes every request.",
        "X",
    )
    lengths: Literal["auto", "hidden", "histogram", "max-tokens"] = setting(
        GATEWAY.lengths,
        "Who predicts what is left of an answer: hidden (the engines, and histogram for what they do not "
        "predict), histogram (what such answers had left so far), max-tokens, or auto: hidden where the "
        "system needs lengths, else nobody.",
        "SOURCE",
    )
    split: Split | None = setting(None, "Prefill and decode instances at start-up.", "P:D", shown="even")

    @model_validator(mode="after")
    @with_value_errors
    def _takes_options(self) -> SchedulingSection:
        self.make_system()
        return self

    def make_system(self) -> System:
        """Build the composition. Raises ConfigError for an option it cannot take."""
        from tidegate.systems import make_system

        return make_system(self.system, split=self.split, slo=self.slo)


class FleetSection(Section):
    """Where instances come from: ``model`` starts them here, as vLLM servers with ``launch``, ``emulate``
    starts emulated ones, ``vllm`` uses running ones."""

    panel = "Instances"

    model: ModelFolder | None = setting(
        None,
        "Model for embedded engines or launched servers: a folder in the Hugging Face layout, smollm2, which "
        "is fetched once (SmolLM2-135M-Instruct, 93 MB), or tiny, a random one made at once.",
        "DIR|NAME",
        shown="smollm2",
    )
    instances: Whole = setting(3, "Number of embedded engines or launched servers.", ge=1, le=256)
    launch: Literal["vllm"] | None = setting(
        None,
        "Start stock `vllm serve` processes, in place of embedded engines, and keep them alive: one per "
        "GPU where there are any. They hand KV to each other.",
        "vllm",
    )
    vllm_args: ServeWords | None = launched(
        None,
        "Further arguments of `vllm serve`, in quotes: '--tensor-parallel-size 2' gives each server two "
        "GPUs.",
        "'WORDS'",
    )
    vllm_bin: Path | None = launched(
        None, "vLLM's command, in whatever environment it is installed.", "FILE", shown="vllm on PATH"
    )
    vllm_logs: Path | None = launched(
        None,
        "Where the servers' output goes, a file for each instance.",
        "DIR",
        shown="a new folder in ~/.local/state/tidegate",
    )
    emulate: Groups | None = setting(
        None,
        "N emulated instances of a packaged profile (`profile --list` shows them), in place of embedded "
        "engines: real HTTP and made-up tokens, at the pace of that GPU. Repeat for a mixed fleet of one "
        "model.",
        "GPU/MODEL:N",
    )
    vllm: Urls | None = setting(
        None,
        "A running vLLM server, in place of embedded engines; repeat for each. KV moves between those "
        "that have NixlConnector ('tidegate check' proves it), or another --kv-connector; prefill=URL "
        "and decode=URL are servers that may do only that.",
        "URL",
    )
    vllm_api_key: Key | None = Field(
        None, repr=False, description="Key that the vLLM servers want: no flag, which others could see."
    )
    kv_connector: Literal["auto", "nixl", "mooncake", "none"] = running(
        "auto",
        "How running vLLM servers hand on KV: nixl, mooncake, none, or auto for what their metrics show, "
        "which is NIXL only.",
        "NAME",
    )
    kv_lease_s: Seconds | None = running(
        None,
        "How long running vLLM servers keep KV for a pull: NixlConnector's kv_lease_duration, or "
        "Mooncake's VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT.",
        "S",
        shown="vLLM's: 30 with nixl, 480 with mooncake",
    )
    kv_bootstrap: Bootstraps | None = running(
        None,
        "Where MooncakeConnector's bootstrap server of each vLLM server is, in their order; other "
        "servers reach it there, too.",
        "URL",
        shown="port 8998 of each server",
    )
    kv_read_back: bool = running(
        False,
        "Let a prefill on a running vLLM server begin with KV that earlier rounds left on another. Only "
        "for servers that have bidirectional_kv_xfer ('tidegate check' proves it): others hang.",
        name="--kv-read-back/--no-kv-read-back",
    )
    profile: Profiles | None = setting(
        None,
        "What the vLLM servers' steps cost: a file of `tidegate profile --vllm URL --out FILE`, or a "
        "packaged profile (`profile --list` shows them). One for all, or one for each in their order.",
        "FILE|NAME",
        needs=("vllm", "launch"),
    )

    @model_validator(mode="after")
    def _is_complete(self) -> FleetSection:
        if self.launch and self.model is None:
            raise ValueError(f"--launch {self.launch} needs a --model DIR, which every server loads")
        given, servers = len(self.kv_bootstrap or ()), len(self.vllm or ())
        if given and self.kv_connector != "mooncake":
            raise ValueError("--kv-bootstrap is only for --kv-connector mooncake")
        if given and servers and given != servers:
            raise ValueError(f"{given} bootstrap URLs for {servers} servers: give one for each")
        return self

    @property
    def kv(self) -> KvSetup:
        """How the KV of running vLLM servers moves."""
        from tidegate.fleet.vllm import KvSetup

        return KvSetup(self.kv_connector, self.kv_lease_s, self.kv_read_back, self.kv_bootstrap or ())

    @property
    def on_vllm(self) -> bool:
        """Whether the instances are vLLM servers."""
        return bool(self.vllm or self.launch)

    @property
    def size(self) -> int:
        """The number of instances of the whole fleet."""
        if self.emulate:
            from tidegate.dataplane.replica import parse_groups

            return sum(group.count for group in parse_groups(self.emulate))
        return len(self.vllm) if self.vllm else self.instances


class EngineSection(Section):
    """What the embedded engines are started with."""

    panel = "Embedded engines"

    device: str = setting("cpu", "cpu, cuda or cuda:N.", pattern=r"^(cpu|cuda(:\d+)?)$")
    dtype: Literal["auto", "float32", "float64", "bfloat16", "float16"] = setting(
        "auto",
        "auto, float32, float64, bfloat16 or float16. float64 makes tokens independent of scheduling, at "
        "about twice the time.",
    )
    max_model_len: Tokens | None = setting(None, "Longest prompt plus answer.", "TOKENS", shown="the model's")
    kv_memory_mb: Count = setting(256, "KV cache of each engine.", "MB")
    max_batch_tokens: Tokens = setting(512, "Tokens that one engine step may process.", "TOKENS")
    threads: Count = setting(1, "CPU threads of each engine, where there are more cores than engines.", "N")
    predictor: str = setting(
        "auto",
        "Head that predicts from hidden states how long answers become: a file that `tidegate predictor "
        "train` wrote, auto for the packaged one of the model, or off.",
        "FILE",
    )


class EmulatedSection(Section):
    """What emulated instances are: the settings of ``tidegate sim`` of the same names."""

    panel = "Emulated instances"

    chunk_tokens: Count = emulated(8192, "Token budget of a step.", "N")
    host_ms: Milliseconds = emulated(0.0, "Host time added to every step.", "MS")
    front_ms: Milliseconds = emulated(
        0.0, "From dispatch to the engine's queue, per leg, beside what HTTP takes here.", "MS"
    )


class Config(Section):
    """All settings of one ``tidegate serve``; a section may be empty but not absent."""

    gateway: GatewaySection
    scheduling: SchedulingSection
    fleet: FleetSection
    engine: EngineSection
    emulated: EmulatedSection

    @model_validator(mode="after")
    @with_value_errors
    def _system_fits_the_fleet(self) -> Config:
        from tidegate.policies.order import FIFO
        from tidegate.policies.protocols import Signal
        from tidegate.systems import SYSTEMS, make_system, split_order

        size = self.fleet.size
        split = self.scheduling.split
        if split is not None and sum(split) != size:
            raise ValueError(f"split {split[0]}:{split[1]} adds up to {sum(split)}, the fleet has {size}")
        system = self.scheduling.make_system()
        system.roles(size)
        profiles = self.fleet.profile or []
        if self.fleet.on_vllm and len(profiles) not in (0, 1, size):
            raise ValueError(f"{len(profiles)} profiles for {size} servers: give one for all or for each")
        if self.fleet.on_vllm and Signal.PROFILE in system.needs and not profiles:
            free = ", ".join(name for name in SYSTEMS.names() if not make_system(name).needs)
            raise ValueError(
                f"system {system.name!r} needs a measured profile, which vLLM servers do not bring: give "
                "--profile, a file of `tidegate profile --vllm URL --out FILE` or a packaged one's name, or "
                f"choose a --system that needs none: {free}"
            )
        if self.fleet.on_vllm and system.order.name != FIFO.name:
            name, order = split_order(system.name)
            instead = name if order is not None else f"{name}+{FIFO.name}"
            raise ValueError(
                f"system {system.name!r} orders waiting prefills by {system.order.name}, which vLLM servers "
                f"do not offer; take {instead!r}"
            )
        return self

    def gateway_settings(self) -> GatewaySettings:
        """Return what the gateway is started with: its section, and the targets."""
        front = self.gateway
        given = {GATEWAY_NAMES.get(name, name): value for name, value in front if value is not None}
        given.pop("api_key_file", None)
        scheduling = self.scheduling
        given["cors_origins"] = tuple(front.cors_origins or ())
        return GatewaySettings(
            slo=scheduling.slo, admission=scheduling.admission, lengths=scheduling.lengths, **given
        )


GATEWAY_NAMES = {
    "request_timeout": "request_deadline_s",
    "stall_timeout": "stall_s",
    "stream_head": "head_after_s",
}
"""Fields of ``GatewaySettings`` by their names in [gateway], where the two differ."""
SECTIONS: dict[str, Any] = {name: field.annotation for name, field in Config.model_fields.items()}
SETTINGS: dict[str, str] = {name: section for section, kind in SECTIONS.items() for name in kind.model_fields}
"""The section of every setting, by the setting's name."""
FLAGS: dict[str, Flag] = {
    name: flag
    for kind in SECTIONS.values()
    for name, field in kind.model_fields.items()
    for flag in field.metadata
    if isinstance(flag, Flag)
}
"""The settings that have an option on the command line."""
SYSTEM_WITH_VLLM = "static"
"""The default system in front of vLLM servers while no profile of theirs is given."""
SECRETS = frozenset({"api_key", "tenants", "vllm_api_key"})


class GivenSettings(OptionGroup):
    """The options of all settings, which make a dict of those that are given: values as they are written."""

    def __init__(self) -> None:
        super().__init__(dict, FLAGS)

    def parameters(self) -> Iterator[Parameter]:
        for name, flag in FLAGS.items():
            section = SECTIONS[SETTINGS[name]]
            field = section.model_fields[name]
            placed = flag.placed(section.panel, plain(field.default))
            yield placed.parameter(name, given_type(field.annotation) | None, None)


def plain(value: Any) -> Any:
    """Return a setting's value as TOML and the command line write it."""
    match value:
        case Slo() | Path():
            return str(value)
        case (int() as p, int() as d):
            return f"{p}:{d}"
        case float() if value.is_integer():
            return int(value)
        case _:
            return value
