"""The packaged profiles: GPUs x models x parallelism x engines, by name.

A name is ``gpu/model[/tpN][@engine]``: ``h100_sxm/llama-3.1-8b``, ``h100_sxm/llama-3.1-70b/tp4``,
``h100_sxm/llama-3.1-8b@sglang``. One GPU and vLLM go without saying. The coefficients are fits to published
measurements (``profiles/README.md`` has their origin and licences); transfers are assumed, see
``assumed_links``. This is the one module of the room that reads a file: its own packaged data.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from importlib import resources
from typing import Any

from tidegate.core.errors import ConfigError
from tidegate.costs.forms import TransferCost
from tidegate.costs.profile import Profile

MIXED_CONTEXT_RATIO = 2.0
"""Cost of a resident token beside a prefill chunk, over its cost in a pure decode step, where not measured.

Measured steps of vLLM show 1.9 to 3.4; aiconfigurator prices both equally. The default leans to the measured
engines' low end.
"""
NETWORK_BYTES_PER_S = 50e9
"""Nominal bytes/s, one direction, of a GPU's port between nodes: one 400 Gbit/s network port per GPU."""
LINK_EFFICIENCY = 0.8
"""Assumed share of the nominal bandwidth that a KV transfer reaches."""
INTRA_NODE_LATENCY_S = 0.0005
INTER_NODE_LATENCY_S = 0.001
"""Assumed time to set up one transfer."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """Nominal figures: dense FLOP/s, bytes/s of memory and of one direction of the port, bytes of memory."""

    bf16_flops: float
    fp8_flops: float
    memory_bytes_per_s: float
    memory_bytes: float
    port_bytes_per_s: float


GPUS = {
    "a100_sxm": Gpu(312e12, 312e12, 2.039e12, 80e9, 300e9),
    "b200_sxm": Gpu(2250e12, 4500e12, 8.0e12, 180e9, 900e9),
    "h100_pcie": Gpu(756e12, 1513e12, 2.0e12, 80e9, 64e9),
    "h100_sxm": Gpu(989e12, 1979e12, 3.35e12, 80e9, 450e9),
    "h200_sxm": Gpu(989e12, 1979e12, 4.8e12, 141e9, 450e9),
    "h20_sxm": Gpu(148e12, 296e12, 4.0e12, 96e9, 450e9),
    "l4": Gpu(121e12, 242e12, 0.3e12, 24e9, 32e9),
    "l40s": Gpu(362e12, 733e12, 0.864e12, 48e9, 32e9),
    "rtx_4090": Gpu(165e12, 330e12, 1.008e12, 24e9, 32e9),
    "rtx_pro_6000": Gpu(468e12, 936e12, 1.597e12, 96e9, 64e9),
}
"""Nominal figures as publicly stated, without sparsity; not verified against data sheets. The A100 is that of
80 GB, the B200 that of an HGX; the RTX 4090's bf16 is with fp32 accumulation, the RTX PRO 6000 is the Server
Edition, scaled to 2,430 MHz. fp8 on A100 is bf16. Ports: NVLink of SXM parts, else PCIe x16."""


@dataclass(frozen=True, slots=True)
class PackagedProfile:
    """A profile with what else is known of its (GPU, model, parallelism, engine).

    ``profile.transfer`` is the link inside a node; both links are assumed unless measured.
    ``kv_capacity_tokens`` is rough. ``note`` is the publisher's caveat, empty if none: show it to whoever
    picks the profile.
    """

    profile: Profile
    model: str
    kv_bytes_per_token: int
    kv_capacity_tokens: int
    inter_node: TransferCost
    note: str = ""

    @property
    def name(self) -> str:
        return self.profile.name

    @property
    def mixed_measured(self) -> bool:
        """Whether every coefficient of the mixed form was measured; else one is derived."""
        return any(form == "mixed" for form, _, _ in self.profile.errors)


def profile_names() -> tuple[str, ...]:
    """Return the name of every packaged profile, sorted."""
    return tuple(sorted(_entries()))


def packaged_profile(name: str, *, mixed_context_ratio: float | None = None) -> PackagedProfile:
    """Return the packaged profile ``name``.

    The mixed form is the measured one, or the prefill form (its N counts the decodes too) plus the decode
    form's context slope times MIXED_CONTEXT_RATIO. A given ``mixed_context_ratio`` sets that slope in both
    cases. Raises ConfigError for an unknown name or a ratio that is not positive.
    """
    entries = _entries()
    if name not in entries:
        raise ConfigError(_unknown(name, tuple(sorted(entries))))
    if mixed_context_ratio is not None and not 0 < mixed_context_ratio < math.inf:
        raise ConfigError(f"mixed_context_ratio must be a positive number, not {mixed_context_ratio}")
    entry = entries[name]
    intra_node, inter_node = assumed_links(GPUS[entry["gpu"]].port_bytes_per_s, entry["tp"])
    mixed, how, errors = entry["mixed"], "measured", entry["errors"]
    if mixed is None or mixed_context_ratio is not None:
        ratio = MIXED_CONTEXT_RATIO if mixed_context_ratio is None else mixed_context_ratio
        mixed = {**(mixed or entry["prefill"]), "d_s": entry["step"]["c_s"] * ratio}
        how = f"derived with context ratio {ratio:g}"
        errors = [row for row in errors if row[0] != "mixed"]
    profile = Profile.from_json(
        {
            "name": name,
            "prefill": entry["prefill"],
            "step": entry["step"],
            "mixed": mixed,
            "transfer": asdict(intra_node),
            "source": f"{entry['source']}; mixed steps {how}; transfers assumed",
            "errors": errors,
        }
    )
    known = {key: entry[key] for key in ("model", "kv_bytes_per_token", "kv_capacity_tokens", "note")}
    return PackagedProfile(profile=profile, inter_node=inter_node, **known)


def assumed_links(
    port_bytes_per_s: float, tp: int, network_bytes_per_s: float = NETWORK_BYTES_PER_S
) -> tuple[TransferCost, TransferCost]:
    """Return the links inside and between nodes; each of ``tp`` GPUs moves its share through its own port."""
    share = LINK_EFFICIENCY * tp
    inside = TransferCost(INTRA_NODE_LATENCY_S, share * port_bytes_per_s)
    return inside, TransferCost(INTER_NODE_LATENCY_S, share * min(port_bytes_per_s, network_bytes_per_s))


def _entries() -> dict[str, dict[str, Any]]:
    file = resources.files("tidegate.costs") / "profiles" / "packaged.json"
    entries: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return entries


def _unknown(name: str, names: tuple[str, ...]) -> str:
    wanted = name.strip().lower()
    near = [n for n in names if wanted and n.startswith(wanted)] or get_close_matches(wanted, names, 4)
    if not near:
        return f"no packaged profile is called {name!r}; there are: {', '.join(names)}"
    return (
        f"no packaged profile is called {name!r}; near: {', '.join(near)} "
        f"(`tidegate profile --list` shows all {len(names)})"
    )
