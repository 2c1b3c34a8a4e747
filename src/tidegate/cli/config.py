"""The settings of ``tidegate serve``: what exists, what is allowed, what the defaults are.

A setting is a field of a section. ``[gateway] port`` in the file is ``--port`` on the command line and
``TIDEGATE_PORT`` in the environment: field names are unique over all sections. Defaults that are
measured or derived elsewhere are None here.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from tidegate.core.errors import ConfigError
from tidegate.core.slo import Slo
from tidegate.costs.named_profile import load_profile
from tidegate.dataplane.replica import EngineSettings
from tidegate.dataplane.roster import parse_groups
from tidegate.fleet.static import KvSetup, checked_url, server_of
from tidegate.fleet.vllm_command import ServeArguments
from tidegate.policies.order import Fifo
from tidegate.policies.protocols import Signal
from tidegate.systems import SYSTEMS, make_system, named
from tidegate.systems.system import System


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError("expected a whole number")
    try:
        return int(value)
    except ValueError:
        raise ValueError("expected a whole number") from None


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("expected a number of seconds")
    try:
        return float(value)
    except ValueError:
        raise ValueError("expected a number of seconds") from None


def _milliseconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("expected a number of milliseconds")
    try:
        return float(value)
    except ValueError:
        raise ValueError("expected a number of milliseconds") from None


def _known_system(name: str) -> str:
    try:
        named(name)
    except ConfigError as error:
        raise ValueError(error.message) from None
    return name


def _slo(value: object) -> Slo:
    if isinstance(value, Slo):
        return value
    try:
        return Slo.parse(str(value))
    except ConfigError as error:
        raise ValueError(error.message) from None


def _split(value: object) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+):(\d+)", str(value))
    if not found or "0" in found.groups():
        raise ValueError("expected P:D, prefill and decode instances, each at least 1, as in 1:2")
    return int(found[1]), int(found[2])


def _words(value: object, what: str) -> list[str]:
    """Return a list of words; as text they stand apart by blanks or commas."""
    words = value.replace(",", " ").split() if isinstance(value, str) else value
    if not isinstance(words, list | tuple) or not words or not all(isinstance(word, str) for word in words):
        raise ValueError(f"expected a list of {what}")
    return list(words)


def _urls(value: object) -> list[str]:
    words = _words(value, "URLs")
    try:
        servers = [server_of(word) for word in words]
    except ConfigError as error:
        raise ValueError(error.message) from None
    if len({url for url, _ in servers}) < len(servers):
        raise ValueError("a URL is given more than once")
    return [url if role is None else f"{role.label}={url}" for url, role in servers]


def _bootstraps(value: object) -> list[str]:
    try:
        return [checked_url(word) for word in _words(value, "URLs")]
    except ConfigError as error:
        raise ValueError(error.message) from None


def _groups(value: object) -> list[str]:
    words = _words(value, "PROFILE:N")
    try:
        parse_groups(words)
    except ConfigError as error:
        raise ValueError(error.message) from None
    return words


def _profiles(value: object) -> list[str]:
    """Check that each names a profile; a file's path is made absolute, as the model's folder is."""
    words = [str(Path(word).resolve()) if _is_file(word) else word for word in _words(value, "profiles")]
    for word in words:
        try:
            load_profile(word)
        except ConfigError as error:
            raise ValueError(error.message) from None
    return words


def _is_file(profile: str) -> bool:
    return profile.endswith(".json") and ":" not in profile


def _serve_arguments(value: str) -> str:
    try:
        ServeArguments(shlex.split(value))
    except ConfigError as error:
        raise ValueError(error.message) from None
    return value


def _sendable(value: str) -> str:
    if not value or not value.isascii() or not value.isprintable() or " " in value:
        raise ValueError("an API key is one word of printable ASCII, as an HTTP header carries it")
    return value


def _model_folder(value: Path) -> Path:
    if not (value / "config.json").is_file():
        raise ValueError("no such model: expected a folder in the Hugging Face layout, with a config.json")
    return value.resolve()


def _file_path(value: Path) -> Path:
    if value.is_dir():
        raise ValueError("is a folder; expected a file")
    return value


Whole = Annotated[int, BeforeValidator(_whole)]
Seconds = Annotated[float, BeforeValidator(_seconds), Field(gt=0, allow_inf_nan=False)]
Key = Annotated[str, AfterValidator(_sendable)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class GatewaySection(Section):
    """Where clients connect."""

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    port: Annotated[Whole, Field(ge=0, le=65535)] = 8000
    api_key: Key | None = Field(default=None, repr=False)
    api_key_file: Path | None = None
    journal: Annotated[Path, AfterValidator(_file_path)] | None = None
    request_timeout: Seconds = 600.0
    stall_timeout: Seconds = 60.0


class SchedulingSection(Section):
    """Who decides, and for which targets."""

    system: Annotated[str, AfterValidator(_known_system)] = "arrow-lending"
    slo: Annotated[Slo, BeforeValidator(_slo)] = Slo()
    split: Annotated[tuple[int, int], BeforeValidator(_split)] | None = None

    @model_validator(mode="after")
    def _takes_options(self) -> SchedulingSection:
        try:
            self.make_system()
        except ConfigError as error:
            raise ValueError(error.message) from None
        return self

    def make_system(self) -> System:
        """Build the composition. Raises ConfigError for an option it cannot take."""
        return make_system(self.system, split=self.split, slo=self.slo)


class FleetSection(Section):
    """Where instances come from: ``model`` starts them here, as vLLM servers with ``launch``, ``emulate``
    starts pretended ones, ``vllm`` uses running ones."""

    model: Annotated[Path, AfterValidator(_model_folder)] | None = None
    instances: Annotated[Whole, Field(ge=1, le=256)] = 3
    launch: Literal["vllm"] | None = None
    vllm_args: Annotated[str, AfterValidator(_serve_arguments)] | None = None
    vllm_bin: Path | None = None
    vllm_logs: Path | None = None
    emulate: Annotated[list[str], BeforeValidator(_groups)] | None = None
    vllm: Annotated[list[str], BeforeValidator(_urls)] | None = None
    vllm_api_key: Key | None = Field(default=None, repr=False)
    kv_connector: Literal["auto", "nixl", "mooncake", "none"] = "auto"
    kv_lease_s: Seconds | None = None
    kv_bootstrap: Annotated[list[str], BeforeValidator(_bootstraps)] | None = None
    kv_read_back: bool = False
    profile: Annotated[list[str], BeforeValidator(_profiles)] | None = None

    @model_validator(mode="after")
    def _names_a_model(self) -> FleetSection:
        if self.launch and self.model is None:
            raise ValueError(f"--launch {self.launch} needs a --model DIR, which every server loads")
        return self

    @model_validator(mode="after")
    def _finds_the_kv(self) -> FleetSection:
        given, servers = len(self.kv_bootstrap or ()), len(self.vllm or ())
        if given and self.kv_connector != "mooncake":
            raise ValueError("--kv-bootstrap is only for --kv-connector mooncake")
        if given and servers and given != servers:
            raise ValueError(f"{given} bootstrap URLs for {servers} servers: give one for each")
        return self

    @property
    def kv(self) -> KvSetup:
        """How the KV of running vLLM servers moves."""
        return KvSetup(self.kv_connector, self.kv_lease_s, self.kv_read_back, self.kv_bootstrap or ())

    @property
    def on_vllm(self) -> bool:
        """Whether the instances are vLLM servers."""
        return bool(self.vllm or self.launch)

    @property
    def size(self) -> int:
        """The number of instances of the whole fleet."""
        if self.emulate:
            return sum(group.count for group in parse_groups(self.emulate))
        return len(self.vllm) if self.vllm else self.instances


class EngineSection(Section):
    """What the embedded engines are started with."""

    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = "cpu"
    dtype: Literal["auto", "float32", "float64", "bfloat16", "float16"] = "auto"
    max_model_len: Annotated[Whole, Field(ge=16)] | None = None
    kv_memory_mb: Annotated[Whole, Field(ge=1)] = 256
    max_batch_tokens: Annotated[Whole, Field(ge=16)] = 512


class EmulatedSection(Section):
    """What emulated instances are: the settings of ``tidegate sim`` of the same names."""

    chunk_tokens: Annotated[Whole, Field(ge=1)] = EngineSettings().max_batch_tokens
    host_ms: Annotated[float, BeforeValidator(_milliseconds), Field(ge=0, allow_inf_nan=False)] = 0.0
    front_ms: Annotated[float, BeforeValidator(_milliseconds), Field(ge=0, allow_inf_nan=False)] = 0.0


class Config(Section):
    """All settings of one ``tidegate serve``; a section may be empty but not absent."""

    gateway: GatewaySection
    scheduling: SchedulingSection
    fleet: FleetSection
    engine: EngineSection
    emulated: EmulatedSection

    @model_validator(mode="after")
    def _system_fits_the_fleet(self) -> Config:
        size = self.fleet.size
        split = self.scheduling.split
        if split is not None and sum(split) != size:
            raise ValueError(f"split {split[0]}:{split[1]} adds up to {sum(split)}, the fleet has {size}")
        try:
            system = self.scheduling.make_system()
            system.roles(size)
        except ConfigError as error:
            raise ValueError(error.message) from None
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
        if self.fleet.on_vllm and system.order.name != Fifo().name:
            raise ValueError(
                f"system {system.name!r} orders waiting prefills by {system.order.name}, which vLLM servers "
                f"do not offer; take {system.name.partition('+')[0]!r}, without an order"
            )
        return self


SECTIONS: dict[str, type[Section]] = {
    "gateway": GatewaySection,
    "scheduling": SchedulingSection,
    "fleet": FleetSection,
    "engine": EngineSection,
    "emulated": EmulatedSection,
}
SETTINGS: dict[str, str] = {name: section for section, kind in SECTIONS.items() for name in kind.model_fields}
"""The section of every setting, by the setting's name."""
SYSTEM_WITH_VLLM = "static"
"""The default system in front of vLLM servers while no profile of theirs is given."""
SECRETS = frozenset({"api_key", "vllm_api_key"})


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
