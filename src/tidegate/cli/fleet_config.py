"""The settings of ``tidegate serve`` about its instances: where they come from, and what they are."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from tidegate.cli.sections import Section, setting
from tidegate.cli.setting_types import (
    Bootstraps,
    Count,
    Delay,
    Groups,
    InstanceRange,
    Key,
    Milliseconds,
    ModelFolder,
    ProfileName,
    Profiles,
    Seconds,
    ServeWords,
    Tokens,
    Urls,
)
from tidegate.core.notation import FleetRange

if TYPE_CHECKING:
    from tidegate.fleet.vllm import KvSetup

launched = partial(setting, panel="Launched vLLM servers", needs=("launch",))
running = partial(setting, needs=("vllm",))
emulated = partial(setting, needs=("emulate",))


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
    instances: InstanceRange = setting(
        FleetRange(3, 3),
        "Number of embedded engines or launched servers. A..B starts with A; the system, or an operator, may "
        "add more up to B.",
        "N|A..B",
    )
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
        "N emulated instances of a packaged profile (`profile --list` shows them) or of a measured one's "
        "file, in place of embedded engines: real HTTP and made-up tokens, at the pace of that GPU. Repeat "
        "for a mixed fleet of one model; the last one may grow, with A..B for N.",
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
    def range(self) -> FleetRange:
        """The instances that the whole fleet starts with, and those that it may grow to."""
        if self.emulate:
            from tidegate.dataplane.replica import parse_groups

            groups = parse_groups(self.emulate)
            least = sum(group.count for group in groups)
            return FleetRange(least, least + groups[-1].spares)
        return FleetRange(len(self.vllm), len(self.vllm)) if self.vllm else self.instances

    def groups(self, first: int) -> tuple[str, ...]:
        """Return the groups of emulated instances with ``first`` to begin with: the last one has the rest."""
        from tidegate.dataplane.replica import parse_groups

        *others, last = parse_groups(self.emulate or ())
        count = first - sum(group.count for group in others)
        fixed = [f"{group.named}:{group.count}" for group in others]
        return *fixed, f"{last.named}:{FleetRange(count, last.count + last.spares)}"


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
    pace: ProfileName | None = setting(
        None,
        "A profile, measured or packaged, whose steps each engine takes as long for, even where it is done "
        "sooner. Engines that share cores then keep the pace of ones with hardware of their own.",
        "FILE|NAME",
        shown="their own",
    )
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
    start_delay: Delay = emulated(0.0, "How long an added instance takes to come up.", "S")
