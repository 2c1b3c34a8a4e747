"""The settings of ``tidegate serve``: what exists, what is allowed, what the defaults are, how it is told.

A setting is a field of a section. ``[gateway] port`` in the file is ``--port`` on the command line and
``TIDEGATE_PORT`` in the environment: field names are unique over all sections. A field without a ``Flag``
has no option on the command line. Defaults that are measured or derived elsewhere are None here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from tidegate.cli.common_flags import CHUNKS_HELP
from tidegate.cli.fleet_config import EmulatedSection, EngineSection, FleetSection
from tidegate.cli.options import Flag, OptionGroup, given_type
from tidegate.cli.scaling import ScalingSection
from tidegate.cli.sections import Section, setting
from tidegate.cli.setting_types import (
    Count,
    Fields,
    FilePath,
    Key,
    Multiple,
    Networks,
    Origins,
    Recording,
    Seconds,
    Shares,
    Split,
    SystemName,
    Targets,
    Whole,
    Words,
    with_value_errors,
)
from tidegate.cli.systems_help import SYSTEMS_HELP
from tidegate.core.defaults import DEFAULT_SYSTEM
from tidegate.core.notation import FleetRange
from tidegate.core.slo import Slo
from tidegate.gateway.settings import GatewaySettings
from tidegate.signals.forecast.choice import AUTO, DEPLOYED, ForecastSettings, check_source
from tidegate.signals.forecast.feed import PERIOD_S, STEPS
from tidegate.systems.registry import GivenOptions

if TYPE_CHECKING:
    from tidegate.policies.protocols import AnswerLengths
    from tidegate.systems.system import System

GATEWAY = GatewaySettings()
"""The gateway's own defaults."""


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
    shares: Shares | None = setting(
        None,
        "Share what is served among tenants by these weights, * for those not named; a tenant is the name of "
        "an API key, or what a trusted proxy says. Repeat for each.",
        "TENANT=WEIGHT",
        name="--share",
    )
    lengths: Literal["auto", "hidden", "histogram", "max-tokens"] = setting(
        GATEWAY.lengths,
        "Who predicts what is left of an answer: hidden (the engines, and histogram for what they do not "
        "predict), histogram (what such answers had left so far), max-tokens, or auto: hidden where the "
        "system needs lengths, else nobody.",
        "SOURCE",
    )
    chunks: Literal["fixed", "slack"] | None = setting(
        None,
        f"{CHUNKS_HELP} vLLM servers take a fixed one at their launch.",
        "fixed|slack",
    )
    split: Split | None = setting(
        None, "Prefill and decode instances at start-up.", "P:D", shown="the system's own"
    )
    forecast: Literal["auto", "last", "seasonal-naive", "ewma", "arima", "ensemble"] = setting(
        AUTO,
        "Who forecasts the load: last, seasonal-naive, ewma, arima (needs the extra forecast), ensemble (the "
        "mean of those that there are, by recent error), or auto: ensemble where the system needs forecasts, "
        "else nobody.",
        "SOURCE",
    )
    forecast_period: Seconds = setting(PERIOD_S, "Length of a period of forecasts.", "S")
    forecast_steps: Count = setting(STEPS, "How many periods ahead they go.", "N")
    forecast_from: Recording | None = setting(
        None,
        "Begin forecasts with the arrivals and lengths of this journal; it may be that of --journal.",
        "JOURNAL",
    )
    warm_start: Recording | None = setting(
        None,
        "Begin with the lengths of the newest answers in this journal, or of a trace: tidegate labels the "
        "fleet for them at once. It may be the file of --journal.",
        "FILE",
    )

    @model_validator(mode="after")
    @with_value_errors
    def _takes_options(self) -> SchedulingSection:
        from tidegate.systems import make_system

        make_system(self.system, split=self.split, slo=self.slo, chunks=self.chunks)
        check_source(self.forecast, DEPLOYED)
        return self


class Config(Section):
    """All settings of one ``tidegate serve``; a section may be empty but not absent."""

    gateway: GatewaySection
    scheduling: SchedulingSection
    scaling: ScalingSection
    fleet: FleetSection
    engine: EngineSection
    emulated: EmulatedSection

    @model_validator(mode="after")
    @with_value_errors
    def _system_fits_the_fleet(self) -> Config:
        from tidegate.policies.protocols import Signal
        from tidegate.systems import SYSTEMS, make_system

        if self.fleet.on_vllm and self.scheduling.chunks == "slack":
            raise ValueError(
                "chunks slack: vLLM takes the token budget of its steps once, at its launch "
                "(--max-num-batched-tokens); only embedded and emulated engines take one per step"
            )
        size = self.first_size
        split = self.scheduling.split
        if split is not None and sum(split) != size:
            raise ValueError(f"split {split[0]}:{split[1]} adds up to {sum(split)}, the fleet has {size}")
        system = self.make_system()
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
        return self

    @property
    def first_size(self) -> int:
        """The number of instances to start with: the least, or that of a split in the fleet's range."""
        least, most = self.fleet.range
        asked = sum(self.scheduling.split or ())
        return asked if least <= asked <= most else least

    def make_system(self) -> System:
        """Build the composition as this fleet serves it. Raises ConfigError for an option it cannot take."""
        return self.served(self.composed())

    def composed(self) -> System:
        """Build the composition that is named. Raises ConfigError for an option it cannot take."""
        from tidegate.systems import make_system

        options = GivenOptions(
            split=self.scheduling.split,
            fleet=self.scaling.bounds(self.fleet.range),
            advise=self.scaling.advise,
        )
        if self.fleet.emulate:
            options["start_delay_s"] = (self.emulated.start_delay, self.emulated.start_delay)
        scheduling = self.scheduling
        if scheduling.warm_start is not None:
            options["answered"] = self.answered()
        return make_system(scheduling.system, slo=scheduling.slo, chunks=scheduling.chunks, **options)

    def answered(self) -> tuple[AnswerLengths, ...]:
        """Return the answers that the system begins with. Raises TraceError as ``answered_in`` does."""
        from tidegate.journal.reader import is_yet_to_come
        from tidegate.signals.answered import answered_in

        source = self.scheduling.warm_start
        if source is None or is_yet_to_come(source, self.gateway.journal):
            return ()
        return answered_in(str(source))

    def served(self, system: System) -> System:
        """Return ``system`` as this fleet serves it: the plane keeps an order that vLLM servers do not, also
        that of shares, and they have the chunk budget of their launch."""
        from tidegate.policies.order import FIFO

        if not self.fleet.on_vllm:
            return system
        system = replace(system, chunks=None)
        ordering = system.order.name != FIFO.name or self.scheduling.shares
        kept = ordering and not system.order.held
        return system.ordered(system.order.holding(), system.name) if kept else system

    def gateway_settings(self) -> GatewaySettings:
        """Return what the gateway is started with: its section, and the targets."""
        from tidegate.policies.shares import parse_shares

        front = self.gateway
        given = {GATEWAY_NAMES.get(name, name): value for name, value in front if value is not None}
        given.pop("api_key_file", None)
        scheduling = self.scheduling
        given["cors_origins"] = tuple(front.cors_origins or ())
        return GatewaySettings(
            slo=scheduling.slo,
            admission=scheduling.admission,
            shares=parse_shares(scheduling.shares or ()),
            lengths=scheduling.lengths,
            forecast=ForecastSettings(
                scheduling.forecast, scheduling.forecast_period, scheduling.forecast_steps
            ),
            forecast_from=scheduling.forecast_from,
            **given,
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
        case FleetRange(least, most):
            return least if least == most else str(value)
        case (int() as p, int() as d):
            return f"{p}:{d}"
        case float() if value.is_integer():
            return int(value)
        case _:
            return value
