"""The settings of a gateway process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tidegate.core.slo import Slo
from tidegate.protocol import MOST_BODY_BYTES
from tidegate.signals.forecast.choice import ForecastSettings
from tidegate.signals.lengths.choice import AUTO


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """Resolved settings of one gateway process.

    ``request_deadline_s`` bounds a whole request, ``stall_s`` the silence of an engine inside one
    (2.5 times the longest step that a large prefill makes is a good value). A stream without a token by then
    gets its head ``head_after_s`` after its request; before, a failure has an HTTP status of its own.
    ``api_key`` is the operator's, ``tenants`` are names by their keys, ``trusted_proxies`` are networks from
    which ``x-tenant-id`` is taken. ``allowed_hosts`` are names beside loopback that a gateway without a key
    serves, ``allow_fields`` body fields that would be refused (``parameters.GUARDABLE``). Web pages of
    ``cors_origins`` may call the gateway; ``*`` stands for all.
    ``shares`` are weights of tenants (see ``TenantShares``).
    ``lengths`` names the source of length predictions (see ``tidegate.signals.lengths.choice``).
    ``forecast`` says who forecasts the load; ``forecast_from`` is a journal whose load it begins with.
    ``load_every_s`` is the pause between readings of an engine's load. With ``journal_inputs`` the journal
    also has every input of the control plane, from which ``decide_again`` takes its decisions again.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str = field(default="", repr=False)
    slo: Slo = field(default_factory=Slo)
    journal: Path | None = None
    max_body_bytes: int = MOST_BODY_BYTES
    request_deadline_s: float = 600.0
    stall_s: float = 60.0
    connect_s: float = 2.0
    replays: int = 5
    admission: float = 3.0
    shares: Mapping[str, float] = field(default_factory=dict)
    lengths: str = AUTO
    forecast: ForecastSettings = field(default_factory=ForecastSettings)
    forecast_from: Path | None = None
    load_every_s: float = 1.0
    journal_inputs: bool = False
    tenants: Mapping[str, str] = field(default_factory=dict, repr=False)
    trusted_proxies: Sequence[str] = ()
    allowed_hosts: Sequence[str] = ()
    allow_fields: Sequence[str] = ()
    cors_origins: tuple[str, ...] = ()
    head_after_s: float = 1.0
